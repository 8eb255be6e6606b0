"""`outrider accept`: acceptance per position against a recorded expectation; exit code 1 on a departure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.bench.acceptance import (
    Expectation,
    departures,
    interval,
    measure,
    mismatches,
    summary,
    suspect,
)
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.cli.common import (
    NO_DRAFTS,
    Drafting,
    Json,
    Model,
    NumDrafts,
    SpeculativeConfig,
    counting,
    engine_flags,
    engine_options,
    loading,
    out,
    print_json,
    table,
)
from outrider.config import EngineOptions
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.draft.registry import WITHOUT_WEIGHTS
from outrider.engine.llm import LLM
from outrider.errors import OptionError
from outrider.load.hub import BUNDLED


@engine_flags
def accept(
    options: EngineOptions,
    model: Model = None,
    draft: Drafting = WITHOUT_WEIGHTS,
    num_drafts: NumDrafts = None,
    speculative_config: SpeculativeConfig = None,
    prompts: Annotated[Path, typer.Option(help="JSONL file with a prompt a line")] = HELD_OUT,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="only the first so many; left out: all")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate a prompt")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token")] = 0.0,
    expect: Annotated[Path | None, typer.Option(help="recorded expectation; left out: the bundled model's own")] = None,
    record: Annotated[Path | None, typer.Option(help="write what was measured as the expectation")] = None,
    as_json: Json = False,
) -> None:
    """Measure acceptance by position. Exit code 1, with the position, if it left the recorded band."""
    chosen = engine_options(options, model, draft, num_drafts, speculative_config)
    if chosen.speculative_config is None:
        raise OptionError(f"accept measures drafts: give --draft a method other than {NO_DRAFTS}")
    asked = read_prompts(prompts).first(num_prompts)
    with loading(quiet=as_json) as progress:
        llm = LLM.from_options(chosen, progress)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    with counting("prompts", quiet=as_json) as count:
        report = measure(llm, asked, sampling, count)
    measured = Expectation(
        method=llm.engine.resolved.method,
        num_speculative_tokens=llm.engine.resolved.runner.draft_options.num_speculative_tokens,
        prompts=asked.hash,
        max_tokens=max_tokens,
        temperature=temperature,
        drafts=report.drafts,
        rates=report.rates,
        acceptance_length=report.length,
    )
    if record is not None:
        measured.write(record)
    expected = _expectation(expect, model, measured)
    found = departures(expected, report) if expected else []
    if as_json:
        print_json(summary(expected, report, found) | {"method": measured.method, "verifier": options.verifier})
    else:
        _print(measured.method, expected, report)
        for departure in found:
            out.print(f"[bold red]departed[/] {departure}")
        if found:
            out.print(f"suspected cause: {suspect(found)}")
        elif expected:
            out.print("[green]as recorded[/]")
        else:
            out.print("[dim]no record of such a run to compare with; --record FILE makes one[/]")
    if found:
        raise typer.Exit(1)


def _expectation(expect: Path | None, model: str | None, measured: Expectation) -> Expectation | None:
    """The record asked for, which must fit what was run; or the bundled model's own, where it does."""
    if expect is not None:
        expected = Expectation.read(expect)
        if differing := mismatches(expected, measured):
            raise OptionError(f"{expect} cannot be compared with this run: {'; '.join(differing)}")
        return expected
    bundled = BUNDLED / "acceptance" / f"{measured.method}.json"
    if model is None and bundled.exists():
        expected = Expectation.read(bundled)
        return None if mismatches(expected, measured) else expected
    return None


def _print(method: str, expected: Expectation | None, report: AcceptanceReport) -> None:
    rows = table(f"{method}: {report.drafts} drafts", "position", "rate", "95 % interval", "ratio", "expected rate")
    for position, rate in enumerate(report.rates):
        low, high = interval(rate, report.drafts)
        ratio = f"{report.ratios[position - 1]:.3f}" if position else ""
        then = f"{expected.rates[position]:.3f}" if expected else "not recorded"
        rows.add_row(str(position), f"{rate:.3f}", f"{low:.3f} to {high:.3f}", ratio, then)
    out.print(rows)
    out.print(f"acceptance length [bold]{report.length:.3f}[/]")
