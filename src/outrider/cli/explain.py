"""`outrider explain`: which runner will serve a configuration, why not another, and the memory plan."""

from __future__ import annotations

from typing import Any

import typer
from rich.markup import escape

from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    drafting_flags,
    engine_flags,
    engine_options,
    out,
    print_json,
    table,
)
from outrider.config import EngineOptions, Resolved, resolve
from outrider.draft.registry import NO_DRAFTS
from outrider.engine.engine import verdict
from outrider.oracle import Choice, RefusedError
from outrider.runner.memory import MIB


@engine_flags
@drafting_flags
def explain(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Say which runner serves a configuration and why, without loading it. Exit code 2 if none does."""
    options = engine_options(engine, drafting, model, NO_DRAFTS)
    resolved = resolve(options)
    try:
        choice = verdict(resolved)
    except RefusedError as refusal:
        if not as_json:
            raise
        print_json(_configuration(resolved) | {"refused": refusal.to_list()})
        raise typer.Exit(2) from None
    if as_json:
        print_json({**choice.to_dict(), **_configuration(resolved), "memory": resolved.runner.memory.to_dict()})
    else:
        _print(resolved, choice)


def _configuration(resolved: Resolved) -> dict[str, Any]:
    runner = resolved.runner
    return {
        "method": resolved.method,
        "num_speculative_tokens": runner.draft_options.num_speculative_tokens,
        "verifier": runner.verifier.name,
        "model": str(resolved.directory),
        "architecture": runner.model_config.architecture,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": str(runner.device),
        "max_model_len": runner.max_model_len,
        "parts": [
            {"part": part.name, "needs": sorted(feature.name.lower() for feature in part.needs)}
            for part in resolved.parts
        ],
    }


def _print(resolved: Resolved, choice: Choice) -> None:
    runner, memory = resolved.runner, resolved.runner.memory
    asked = "as asked" if choice.forced else "the fastest that offers all this configuration needs"
    out.print(f"runner [bold green]{choice.runner.name}[/], {asked}")
    for entry in choice.passed_over:
        for gap in entry.gaps:
            out.print(f"  [yellow]not {entry.runner}[/]: {gap}")
    limit = runner.model_config.max_position_embeddings
    drafts = runner.draft_options.num_speculative_tokens
    drafting = f"{resolved.method}, {drafts} tokens a round" if drafts else "none"
    out.print(f"model [bold]{runner.model_config.architecture}[/] from {escape(str(resolved.directory))}")
    shortened = "" if memory.max_model_len == limit else f", lowered from {limit} to fit memory or as asked"
    out.print(f"at most {memory.max_model_len} tokens a sequence{shortened}")
    out.print(f"drafting {drafting}; verifier {runner.verifier.name}; {runner.dtype} on {runner.device}")
    needs = table("\nneeds", "part", "features", numbers=False)
    for part in resolved.parts:
        needs.add_row(part.name, ", ".join(sorted(feature.name.lower() for feature in part.needs)) or "nothing")
    out.print(needs)
    plan = table("\nmemory", "for", "MiB", "")
    plan.add_row("weights", f"{memory.weights / MIB:.1f}", "")
    plan.add_row("workspace, at most", f"{memory.workspace / MIB:.1f}", "")
    plan.add_row(
        "keys and values", f"{memory.cache / MIB:.1f}", f"{memory.num_blocks} blocks, {memory.num_tokens} tokens"
    )
    out.print(plan)
