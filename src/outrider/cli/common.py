"""What every command shares: the engine's flags, progress bars, and how results are printed.

No module of a command imports torch at its top, so that help is printed at once: its function does.
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from outrider.cli.flags import with_flags
from outrider.core.option import option
from outrider.core.output import AcceptanceReport
from outrider.core.sizes import MIB
from outrider.errors import OptionError
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.config import Resolved

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]


@dataclass(frozen=True, slots=True)
class Drafting:
    """The drafting flags."""

    draft: str | None = option(
        None,
        "drafting method, module:Class of your own, or a draft head's directory or Hugging Face id; none turns it off",
    )
    num_speculative_tokens: int | None = option(None, "tokens to draft a round (K); left out: as the head says, or 4")
    speculative_config: str | None = option(None, "JSON object with more options of the drafting method")

    def config(self, model: str | None, drafts: bool) -> dict[str, Any] | None:
        """What the flags say together. OptionError if they clash.

        `drafts`: whether the command drafts unasked. The method, where none is named: the bundled model's own, or
        for a `model` of the user's one that needs no weights.
        """
        from outrider.draft.base import ANY_MODEL, BUNDLED_MODEL
        from outrider.draft.registry import NO_DRAFTS, default_method, names_head

        config: dict[str, Any] = {}
        if self.speculative_config is not None:
            try:
                config = json.loads(self.speculative_config)
            except json.JSONDecodeError as error:
                raise OptionError(f"--speculative-config is not JSON: {error}") from None
            if not isinstance(config, dict):
                raise OptionError(f"--speculative-config must be a JSON object: {self.speculative_config}")
        kind = "model" if self.draft is not None and names_head(self.draft) else "method"
        said = {"num_speculative_tokens": self.num_speculative_tokens, kind: self.draft}
        for key, value in said.items():
            if value is not None and config.setdefault(key, value) != value:
                raise OptionError(f"{key} {value} contradicts --speculative-config {self.speculative_config}")
        if not config and not drafts:
            return None
        if "method" not in config and "model" not in config:
            config["method"] = default_method(BUNDLED_MODEL if model is None else ANY_MODEL)
        return None if config == {"method": NO_DRAFTS} else config


Model = Annotated[str | None, typer.Argument(help="local directory or Hugging Face id; left out: the bundled model")]
_SAID_OTHERWISE = ("model", "speculative_config")

drafting_flags = with_flags(Drafting, "drafting", short={"num_speculative_tokens": "-k"})
"""Gives a command the drafting flags, as `drafting: Drafting`."""


def engine_flags_with(**defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command the engine's flags, as `engine: EngineOptions` without model and drafting."""
    return with_flags(EngineOptions, "engine", skip=_SAID_OTHERWISE, defaults=defaults)


engine_flags = engine_flags_with()
"""The same with the record's own defaults."""

single_engine_flags = with_flags(
    EngineOptions, "engine", skip=(*_SAID_OTHERWISE, "seed"), defaults={"enable_prefix_caching": False}
)
"""The same for a command that serves one request: --seed is the request's, and no run may profit from the last."""


UNFAITHFUL = "verifier %s: acceptance is made up, the text is meaningless, times are real"

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def engine_options(
    engine: EngineOptions, drafting: Drafting, model: str | None, *, drafts: bool = True
) -> EngineOptions:
    """The engine's options with the model and the drafting that were asked for.

    `serve`, `generate`, `accept` and `explain` draft unless `--draft none` is given. `drafts`: false for a command that
    drafts only if asked.
    """
    return replace(engine, model=model, speculative_config=drafting.config(model, drafts))


def without_drafts(options: EngineOptions) -> EngineOptions:
    """The same engine with speculation off: the baseline."""
    return replace(options, speculative_config=None)


def _thaw() -> None:
    """At the end: Triton's library reports what the last collection leaves as leaked. It takes half a second."""
    if "triton" in sys.modules:
        gc.unfreeze()


@contextmanager
def starting() -> Iterator[None]:
    """Around imports and loading: what is made here stays, so the garbage collector never looks at it.

    Importing torch makes 300,000 objects, and looking through them again and again is a quarter of the time it takes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_thaw)


@contextmanager
def loading(quiet: bool) -> Iterator[tuple[Callable[[int, int], None] | None, Callable[[int, int], None] | None]]:
    """Progress bars on stderr, for weights and then for programs recorded, as `LLM` takes both.

    There is one line at a time: of several, those further up could not be erased once another process wrote below them.
    """
    if quiet or not err.is_terminal:
        yield None, None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        weights = bar.add_task("loading weights", total=None, amount="")
        programs = bar.add_task("recording programs", total=None, amount="", visible=False)

        def loaded(done: int, total: int) -> None:
            bar.update(weights, completed=done, total=total, amount=f"{done / MIB:.0f}/{total / MIB:.0f} MiB")

        def recorded(done: int, total: int) -> None:
            bar.update(weights, visible=False)
            bar.update(programs, completed=done, total=total, amount=f"{done}/{total}", visible=True)

        yield loaded, recorded


@contextmanager
def counting(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for finished things, on stderr."""
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def waiting(what: str, quiet: bool) -> Iterator[None]:
    """A spinner on stderr for what may take seconds and has no steps to count."""
    if quiet or not err.is_terminal:
        yield
        return
    with err.status(f"[dim]{what}[/]"):
        yield


def say_if_unfaithful(faithful: bool, verifier: str) -> None:
    """A line on stderr where what is printed is not the target's own."""
    if not faithful:
        err.print(f"[bold yellow]{UNFAITHFUL % verifier}[/]")


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    typer.echo(json.dumps(result, indent=2))


def describe_acceptance(report: AcceptanceReport) -> str:
    """How drafts fared, in a few words."""
    if not report.drafts:
        return "no drafts"
    return f"acceptance length {report.length:.2f} ({report.accepted} of {report.drafted} drafts)"


def describe_head(resolved: Resolved) -> dict[str, Any] | None:
    """The draft checkpoint, as `--json` prints it; None if there is none."""
    runner = resolved.runner
    checkpoint = runner.draft_options.checkpoint
    if checkpoint is None:
        return None
    return {
        "directory": str(checkpoint.directory),
        **runner.drafter.describe(runner.draft_options, runner.target),
    }


def describe_drafting(resolved: Resolved) -> str:
    """Method, K and how they come out, in a few words."""
    count = resolved.runner.draft_options.num_speculative_tokens
    if not count:
        return "none"
    manner = resolved.runner.drafter.manner
    return ", ".join(filter(None, (resolved.method, f"{count} tokens a round", manner)))


def table(title: str, *headings: str, numbers: bool = True) -> Table:
    """A plain table; the first column is left-aligned, the others are too if they are not numbers."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column, heading in enumerate(headings):
        made.add_column(heading, justify="right" if column and numbers else "left")
    return made
