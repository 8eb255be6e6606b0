"""What every command shares: the engine's flags, progress bars, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from outrider.cli.flags import with_flags
from outrider.config import EngineOptions
from outrider.core.output import AcceptanceReport
from outrider.errors import OptionError

NO_DRAFTS = "none"

Model = Annotated[str | None, typer.Argument(help="local directory or Hugging Face id; left out: the bundled model")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
Drafting = Annotated[
    str, typer.Option("--draft", help="drafting method, or module:Class of your own; none turns it off")
]
NumDrafts = Annotated[int | None, typer.Option("--num-speculative-tokens", "-k", help="tokens to draft a round (K)")]
SpeculativeConfig = Annotated[
    str | None, typer.Option("--speculative-config", help="JSON object with more options of the drafting method")
]

_SAID_OTHERWISE = ("model", "speculative_config")
engine_flags = with_flags(EngineOptions, "options", skip=_SAID_OTHERWISE)
"""Gives a command the engine's flags, as `options: EngineOptions` without model and drafting."""

seedless_engine_flags = with_flags(EngineOptions, "options", skip=(*_SAID_OTHERWISE, "seed"))
"""The same for a command whose --seed is its one request's."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def engine_options(
    options: EngineOptions, model: str | None, draft: str, num_drafts: int | None, more: str | None
) -> EngineOptions:
    """Completes the engine's options by the model and what the drafting flags say. OptionError for contradictions."""
    config: dict[str, Any] = {}
    if more is not None:
        try:
            config = json.loads(more)
        except json.JSONDecodeError as error:
            raise OptionError(f"--speculative-config is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise OptionError(f"--speculative-config must be a JSON object: {more}")
    if num_drafts is not None and config.setdefault("num_speculative_tokens", num_drafts) != num_drafts:
        raise OptionError(f"-k {num_drafts} contradicts --speculative-config {more}: give one of the two")
    if draft == NO_DRAFTS and config and "method" not in config:
        raise OptionError(f"--draft none drafts nothing, so it has no options: {config}")
    config.setdefault("method", draft)
    return replace(options, model=model, speculative_config=None if config["method"] == NO_DRAFTS else config)


def without_drafts(options: EngineOptions) -> EngineOptions:
    """The same engine with speculation off: the baseline."""
    return replace(options, speculative_config=None)


@contextmanager
def loading(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for weights, on stderr; it stays hidden for models that load at once."""
    if quiet:
        yield None
        return
    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for finished things, on stderr."""
    if quiet:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    typer.echo(json.dumps(result, indent=2))


def describe_acceptance(report: AcceptanceReport) -> str:
    """Drafting in one line."""
    if not report.drafts:
        return "no drafts"
    rates = " ".join(f"{rate:.2f}" for rate in report.rates)
    return f"acceptance length {report.length:.2f} ({report.accepted} of {report.drafted} drafts; by position {rates})"


def table(title: str, *headings: str) -> Table:
    """A plain table; the first column is left-aligned, the others are numbers."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="left" if place == 0 else "right")
    return made
