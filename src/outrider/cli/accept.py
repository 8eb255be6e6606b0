"""`outrider accept`: acceptance per position against a recorded expectation; exit code 1 on a departure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from outrider.bench.acceptance import (
    Departure,
    Expectation,
    Setting,
    departures,
    interval,
    measure,
    mismatches,
    summary,
    suspect,
)
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    counting,
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
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.draft.registry import NO_DRAFTS, WITHOUT_WEIGHTS
from outrider.engine.llm import LLM
from outrider.errors import OptionError
from outrider.load.hub import BUNDLED


@engine_flags
@drafting_flags
def accept(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    prompts: Annotated[Path, typer.Option(help="JSONL file with a prompt a line")] = HELD_OUT,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="only the first so many; left out: all")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate a prompt")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token")] = 0.0,
    expect: Annotated[Path | None, typer.Option(help="recorded expectation; left out: the bundled model's own")] = None,
    record: Annotated[Path | None, typer.Option(help="write what was measured as the expectation")] = None,
    as_json: Json = False,
) -> None:
    """Measure acceptance by position. Exit code 1, with the position, if it left the recorded band."""
    options = engine_options(engine, drafting, model, WITHOUT_WEIGHTS)
    if options.speculative_config is None:
        raise OptionError(f"accept measures drafts: give --draft a method other than {NO_DRAFTS}")
    if record is not None and (record.is_dir() or not record.parent.is_dir()):
        raise OptionError(f"--record must name a file in a directory that exists: {record}")
    expected = None if expect is None else Expectation.read(expect)
    asked = read_prompts(prompts).first(num_prompts)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    with loading(quiet=as_json) as progress:
        llm = LLM.from_options(options, progress)
    setting = Setting.of(llm, asked, sampling)
    say_if_unfaithful(llm.engine.resolved.runner.verifier.faithful, setting.verifier)
    if expected is None and options.model is None:
        expected = _bundled(setting)
    differing = [] if expected is None else mismatches(expected.setting, setting)
    if expect is not None and differing:
        raise OptionError(f"{expect} cannot be compared with this run: {'; '.join(differing)}")
    with counting("prompts", quiet=as_json) as count:
        report = measure(llm, asked, sampling, count)
    if record is not None:
        Expectation.of(setting, report).write(record)
    compared = expected if expected is not None and not differing else None
    found = departures(compared, report) if compared else []
    if as_json:
        print_json(summary(setting, compared, report, found) | {"not_compared": differing})
    else:
        _print(setting, compared, report)
        _print_verdict(compared, found, differing)
    if found:
        raise typer.Exit(1)


def _bundled(setting: Setting) -> Expectation | None:
    """The record that comes with the bundled model for a method, if there is one."""
    path = BUNDLED / "acceptance" / f"{setting.method}.json"
    return Expectation.read(path) if path.exists() else None


def _print_verdict(expected: Expectation | None, found: Sequence[Departure], differing: Sequence[str]) -> None:
    for departure in found:
        out.print(f"[bold red]departed[/] {departure}")
    if found:
        out.print(f"suspected cause: {suspect(found)}")
    elif expected:
        out.print("[green]as recorded[/]")
    elif differing:
        out.print(f"[yellow]not compared with the bundled record[/]: {escape('; '.join(differing))}")
    else:
        out.print("[dim]no record to compare with; --record FILE makes one[/]")


def _print(setting: Setting, expected: Expectation | None, report: AcceptanceReport) -> None:
    title = f"{setting.method}: {report.drafts} drafts"
    rows = table(title, "position", "rate", "95 % interval", "ratio", "expected rate")
    for position, rate in enumerate(report.rates):
        low, high = interval(rate, report.drafts)
        ratio = f"{report.ratios[position - 1]:.3f}" if position else ""
        then = f"{expected.rates[position]:.3f}" if expected else "not recorded"
        rows.add_row(str(position), f"{rate:.3f}", f"{low:.3f} to {high:.3f}", ratio, then)
    out.print(rows)
    out.print(f"acceptance length [bold]{report.length:.3f}[/]")
