"""`outrider accept`: acceptance per position against a recorded expectation; exit code 1 on a departure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from outrider.acceptance.bands import interval
from outrider.acceptance.records import Expectation, Setting, find, read_records, why_not_found, write_record
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    counting,
    describe_drafting,
    drafting_flags,
    engine_flags,
    engine_options,
    loading,
    out,
    print_json,
    say_if_unfaithful,
    table,
)
from outrider.core.sampling import SamplingParams
from outrider.errors import OptionError
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.bench.acceptance import Comparison
    from outrider.engine.llm import LLM


@engine_flags
@drafting_flags
def accept(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    prompts: Annotated[Path, typer.Option(help="JSONL file with a prompt a line")] = HELD_OUT,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="only the first so many; left out: all")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate a prompt")] = 128,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0, help="0, which is the default, takes the most likely token; repeat it to measure at several"
        ),
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(help="records to compare with; left out: acceptance.json beside the head, or the bundled model's"),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="put what was measured into this acceptance.json; compares only if --expect is given too"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure acceptance by position. Exit code 1, with the position and a likely cause, if it left its band."""
    from outrider.bench.acceptance import Comparison, measure, setting_of_run, summary
    from outrider.draft.registry import NO_DRAFTS
    from outrider.engine.llm import LLM

    options = engine_options(engine, drafting, model)
    if options.speculative_config is None:
        raise OptionError(f"accept measures drafts: give --draft a method other than {NO_DRAFTS}")
    if record is not None:
        _check_record(record)
    records = None if expect is None else read_records(expect)
    asked = read_prompts(prompts).first(num_prompts)
    samplings = [
        SamplingParams(temperature=each, max_tokens=max_tokens) for each in dict.fromkeys(temperature or [0.0])
    ]
    with loading(quiet=as_json) as callbacks:
        llm = LLM.from_options(options, *callbacks)
    verifier = llm.engine.resolved.runner.verifier
    say_if_unfaithful(verifier.faithful, verifier.name)
    if record is not None and not verifier.faithful:
        raise OptionError(f"verifier {verifier.name} makes acceptance up: drop --record or the verifier")
    settings = [setting_of_run(llm, asked, sampling) for sampling in samplings]
    if expect is not None:
        _check_comparable(expect, records or [], settings)
    elif record is None:
        records = _own_records(llm)
    runs = []
    for setting, sampling in zip(settings, samplings, strict=True):
        with counting(f"prompts at temperature {sampling.temperature:g}", quiet=as_json) as count:
            report = measure(llm, asked, sampling, count)
        runs.append(Comparison.of(setting, report, records, llm.engine.resolved.runner.drafter))
        if record is not None:
            _record(record, runs[-1])
    if as_json:
        print_json(summary(runs))
    else:
        _print(llm, runs)
    if any(run.passed is False for run in runs):
        raise typer.Exit(1)


def _check_record(record: Path) -> None:
    """Before anything runs: reports a path that cannot be written, or a file that is no acceptance.json."""
    if record.is_dir() or not record.parent.is_dir():
        raise OptionError(f"--record must name a file in a directory that exists: {record}")
    if record.exists():
        read_records(record)


def _check_comparable(expect: Path, records: Sequence[Expectation], settings: Sequence[Setting]) -> None:
    for setting in settings:
        if find(records, setting) is None:
            differing = "; ".join(why_not_found(records, setting))
            raise OptionError(f"{expect} cannot be compared with this run: {differing}")


def _own_records(llm: LLM) -> list[Expectation] | None:
    """What came with the head, or with the bundled model for this method; None if nothing did."""
    from outrider.acceptance.setting import record_file

    path = record_file(llm.engine.resolved)
    return read_records(path) if path is not None and path.exists() else None


def _record(path: Path, run: Comparison) -> None:
    if not run.report.drafts:
        raise OptionError(
            "nothing was drafted, so there is nothing to record: give more prompts or a larger --max-tokens"
        )
    write_record(path, Expectation.of(run.setting, run.report))


def _print(llm: LLM, runs: Sequence[Comparison]) -> None:
    out.print(f"drafting [bold]{describe_drafting(llm.engine.resolved)}[/]")
    for run in runs:
        _print_run(run)
    if len(runs) > 1:
        _print_ratios(runs)


def _print_run(run: Comparison) -> None:
    report, expected = run.report, run.expected
    title = f"\ntemperature {run.setting.temperature:g}: {report.drafts} drafts"
    rows = table(title, "position", "rate", "95 % interval", "ratio", "expected rate", "expected ratio")
    for position, rate in enumerate(report.rates, start=1):
        low, high = interval(rate, report.drafts)
        ratio = f"{report.ratios[position - 2]:.3f}" if position > 1 else ""
        then = f"{expected.rates[position - 1]:.3f}" if expected else "not recorded"
        then_ratio = f"{expected.ratios[position - 2]:.3f}" if expected and position > 1 else ""
        rows.add_row(str(position), f"{rate:.3f}", f"{low:.3f} to {high:.3f}", ratio, then, then_ratio)
    out.print(rows)
    recorded = f", recorded {expected.acceptance_length:.3f}" if expected else ""
    out.print(f"acceptance length [bold]{report.length:.3f}[/]{recorded}")
    for departure in run.departures:
        out.print(f"[bold red]departed[/] {departure}")
    if run.departures:
        out.print(f"suspected cause: {run.suspect}")
    elif expected:
        out.print("[green]as recorded[/]")
    elif run.why_not:
        out.print(f"[yellow]not compared, since the nearest record is another's[/]: {escape('; '.join(run.why_not))}")
    else:
        out.print("[dim]no record to compare with; --record FILE makes one[/]")


def _print_ratios(runs: Sequence[Comparison]) -> None:
    """Of every temperature, side by side: what a guess is worth once those before it stood."""
    width = max(len(run.report.ratios) for run in runs)
    rows = table(
        "\nratios", "temperature", "length", *(f"{position} to {position + 1}" for position in range(1, width + 1))
    )
    for run in runs:
        ratios = (f"{ratio:.3f}" for ratio in run.report.ratios)
        rows.add_row(f"{run.setting.temperature:g}", f"{run.report.length:.3f}", *ratios)
    out.print(rows)
