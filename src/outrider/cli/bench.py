"""`outrider bench`: figures with provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from outrider.bench.prompts import read_prompts
from outrider.bench.speed import Workload, bench
from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    drafting_flags,
    engine_flags,
    engine_options,
    loading,
    out,
    print_json,
    say_if_unfaithful,
    table,
)
from outrider.config import EngineOptions
from outrider.engine.llm import LLM
from outrider.errors import OptionError

app = typer.Typer(help="Measure speed; every figure comes with its command, commit, device and versions.")

InputLen = Annotated[int, typer.Option(min=1, help="tokens of each prompt")]
OutputLen = Annotated[int, typer.Option(min=1, help="tokens generated for each")]
Prompts = Annotated[Path | None, typer.Option(help="JSONL file with a prompt a line; left out: random tokens")]


@app.command("latency")
@engine_flags
@drafting_flags
def latency(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 256,
    prompts: Prompts = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs to take figures over")] = 5,
    as_json: Json = False,
) -> None:
    """One sequence at a time: time to the first token, and a decode step beside its floor."""
    options = engine_options(engine, drafting, model, drafts=False)
    _report(options, _workload(input_len, output_len, prompts), [1], repeats, as_json)


@app.command("throughput")
@engine_flags
@drafting_flags
def throughput(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    prompts: Prompts = None,
    concurrency: Annotated[str, typer.Option(help="sequences run at once, several as 1,8,32")] = "1,8,32",
    repeats: Annotated[int, typer.Option(min=1, help="runs to take figures over")] = 1,
    as_json: Json = False,
) -> None:
    """Many sequences at once: output tokens a second at each concurrency."""
    try:
        wanted = [int(part) for part in concurrency.split(",")]
    except ValueError:
        raise OptionError(f"--concurrency must be numbers with commas between: {concurrency}") from None
    if min(wanted) < 1:
        raise OptionError(f"--concurrency must be 1 or more: {concurrency}")
    options = engine_options(engine, drafting, model, drafts=False)
    _report(options, _workload(input_len, output_len, prompts), wanted, repeats, as_json)


def _workload(input_len: int, output_len: int, prompts: Path | None) -> Workload:
    return Workload(input_len, output_len, None if prompts is None else read_prompts(prompts))


def _report(options: EngineOptions, workload: Workload, concurrency: list[int], repeats: int, as_json: bool) -> None:
    with loading(quiet=as_json) as told:
        llm = LLM.from_options(options, *told)
    result = bench(llm, workload, concurrency, repeats)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    config = result["config"]
    out.print(
        f"[bold]{escape(config['model'])}[/] {config['dtype']}, runner {config['runner']}, drafts {config['method']}"
    )
    say_if_unfaithful(config["faithful"], config["verifier"])
    rows = table(
        f"\n{config['input_len']} tokens in, {config['output_len']} out, {config['prompts']}",
        "concurrency",
        "tokens/s",
        "first token ms",
        "step ms",
        "floor ms",
        "floor/step",
        "acceptance length",
    )
    for row in result["rows"]:
        rows.add_row(
            str(row["concurrency"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['step_ms']:.2f}",
            f"{row['floor_ms']:.2f}",
            f"{row['floor_ms'] / row['step_ms']:.2f}",
            f"{row['acceptance_length']:.2f}",
        )
    out.print(rows)
    out.print(f"[dim]{result['device']}; reads {config['read_gb_per_second']:.1f} GB/s; commit {result['commit']}[/]")
