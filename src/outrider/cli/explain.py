"""`outrider explain`: which runner will serve a configuration, why not another, and the memory plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    describe_drafting,
    describe_head,
    drafting_flags,
    engine_flags,
    engine_options,
    out,
    print_json,
    starting,
    table,
)
from outrider.core.sizes import MIB
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.config import Resolved
    from outrider.core.reading import Fact
    from outrider.oracle import Choice

Table = Annotated[
    bool,
    typer.Option("--table", help="print what each runner serves on each kind of device, as markdown, and nothing else"),
]


_HOSTS = {"uni": "in the engine's own process", "mp": "in a process of its own"}


@engine_flags
@drafting_flags
def explain(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    as_json: Json = False,
    as_table: Table = False,
) -> None:
    """Say which runner serves a configuration and why, without loading it. Exit code 2 if none does."""
    with starting():
        from outrider.config import resolve
        from outrider.oracle import RefusedError

    if as_table:
        from outrider.cli.support import support, to_markdown, to_rows
        from outrider.runner.registry import RUNNERS

        cells = support(RUNNERS)
        print_json({"support": to_rows(cells)}) if as_json else typer.echo(to_markdown(cells), nl=False)
        return
    configuration: dict[str, Any] = {}
    try:
        resolved = resolve(engine_options(engine, drafting, model))
        facts = _facts(resolved)
        configuration = _configuration(resolved, facts)
        choice = resolved.served_by()
    except RefusedError as refusal:
        if not as_json:
            raise
        print_json({**configuration, "refused": refusal.to_list(), "able": list(refusal.able)})
        raise typer.Exit(2) from None
    if as_json:
        print_json({**choice.to_dict(), **configuration, "memory": _memory(resolved)})
    else:
        _print(resolved, choice, facts)


def _configuration(resolved: Resolved, facts: Sequence[Fact]) -> dict[str, Any]:
    runner = resolved.runner
    return {
        "method": resolved.method,
        "num_speculative_tokens": runner.draft_options.num_speculative_tokens,
        "head": describe_head(resolved),
        "verifier": runner.verifier.name,
        "model": str(resolved.directory),
        "architecture": runner.model_config.architecture,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": str(runner.device),
        "max_model_len": runner.sizes.max_model_len,
        "facts": {fact.name.replace(" ", "_"): fact.to_dict() for fact in facts},
        "parts": [
            {"part": part.name, "needs": sorted(feature.name.lower() for feature in part.needs)}
            for part in resolved.parts
        ],
    }


def _facts(resolved: Resolved) -> tuple[Fact, ...]:
    """What was taken of the checkpoint, its chat template included. A checkpoint may have no tokenizer."""
    from outrider.load.tokenizer import FILES, Tokenizer

    if not any((resolved.directory / name).exists() for name in FILES):
        return resolved.facts
    return (*resolved.facts, Tokenizer(resolved.directory).chat_templates().fact())


def _memory(resolved: Resolved) -> dict[str, Any]:
    """The plan, and what of it is the drafter's."""
    runner, plan = resolved.runner, resolved.runner.memory
    drafter = runner.drafter.footprint(runner.draft_options, runner.target)
    share = {
        "weights": drafter.weights,
        "workspace": drafter.workspace,
        "programs": 0,
        "cache": drafter.per_block * plan.num_blocks,
    }
    return {**plan.to_dict(), "drafter": share}


def _print(resolved: Resolved, choice: Choice, facts: Sequence[Fact]) -> None:
    runner, memory = resolved.runner, resolved.runner.memory
    asked = "as asked" if choice.forced else "the fastest that offers all this configuration needs"
    out.print(f"runner [bold green]{choice.runner.name}[/], {asked}; {_HOSTS[choice.distributed_executor_backend]}")
    for entry in choice.passed_over:
        for gap in entry.gaps:
            out.print(f"  [yellow]not {entry.runner}[/]: {gap}")
    limit = runner.model_config.max_position_embeddings
    out.print(f"model [bold]{runner.model_config.architecture}[/] from {escape(str(resolved.directory))}")
    shortened = "" if memory.max_model_len == limit else f", lowered from {limit} to fit memory or as asked"
    out.print(f"at most {memory.max_model_len} tokens a sequence{shortened}")
    out.print(
        f"drafting {describe_drafting(resolved)}; verifier {runner.verifier.name}; {runner.dtype} on {runner.device}"
    )
    for fact in facts:
        out.print(escape(str(fact)))
        if fact.note is not None:
            out.print(f"  [yellow]{escape(fact.note)}[/]")
    head = describe_head(resolved)
    if head is not None:
        rest = (f"{name.replace('_', ' ')} {value}" for name, value in head.items() if name != "directory")
        out.print(escape(f"head {head['directory']}: {', '.join(rest)}"))
    for of, run_by in (("layers", choice.layers), ("layers of the head", choice.draft_layers)):
        if run_by is not None:
            out.print(f"{of} [bold]{run_by.backend.name}[/]: {run_by.backend.note}")
            for reason in run_by.reasons():
                out.print(f"  [yellow]{reason}[/]")
    needs = table("\nneeds", "part", "features", numbers=False)
    for part in resolved.parts:
        needs.add_row(part.name, ", ".join(sorted(feature.name.lower() for feature in part.needs)) or "nothing")
    out.print(needs)
    share = _memory(resolved)["drafter"]
    held = f"{memory.num_blocks} blocks, {memory.num_tokens} tokens"
    sizes = runner.capture.sizes
    recorded = f"for {len(sizes)} batch sizes, to {sizes[-1]} rows" if memory.programs else ""
    drafts = "of that for drafting" if any(share.values()) else ""
    plan = table("\nmemory", "for", "MiB", drafts, "")
    for what, name, note in (
        ("weights", "weights", ""),
        ("workspace, at most", "workspace", ""),
        ("recorded programs", "programs", recorded),
        ("keys and values", "cache", held),
    ):
        plan.add_row(what, f"{getattr(memory, name) / MIB:.1f}", f"{share[name] / MIB:.1f}" if drafts else "", note)
    out.print(plan)
