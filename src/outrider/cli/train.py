"""`outrider train`: a draft head for any supported target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from outrider import env
from outrider.cli.common import Json, Model, counting, err, out, print_json, table
from outrider.cli.flags import with_flags
from outrider.train import run
from outrider.train.options import TrainOptions


@with_flags(TrainOptions, "options", skip=("model",))
def train(options: TrainOptions, model: Model = None, as_json: Json = False) -> None:
    """Train a draft head for a target and write it in the speculators format."""
    silent = as_json or env.process()[0] > 0
    with counting("continuations", quiet=silent or options.on_policy is None) as count, _training(silent) as report:
        figures = run.train(replace(options, model=model), report, count)
    if env.process()[0] > 0:
        return
    if as_json:
        print_json(figures)
    else:
        _print(figures)


@contextmanager
def _training(quiet: bool) -> Iterator[Callable[[float, str], None] | None]:
    """A progress bar on stderr, with the last figures beside it."""
    if quiet:
        yield None
        return
    columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=err, transient=True) as bar:
        task = bar.add_task("training", total=1.0, figures="")
        yield lambda share, figures: bar.update(task, completed=share, figures=figures)


def _print(figures: dict[str, Any]) -> None:
    if "on_policy" in figures:
        out.print(f"{figures['documents']} continuations, {figures['tokens']} tokens, in {figures['on_policy']}")
        return
    held_out = figures["held_out"]
    if held_out is not None:
        rows = table("held-out documents", "depth", "accuracy", "KL in nats")
        by_depth = zip(held_out["accuracy_by_depth"], held_out["loss_by_depth"], strict=True)
        for depth, (accuracy, loss) in enumerate(by_depth):
            rows.add_row(str(depth), f"{accuracy:.3f}", f"{loss:.3f}")
        out.print(rows)
    out.print(
        f"{figures['steps']} steps, {figures['tokens']} tokens, {figures['seconds']:.0f} s; "
        f"the head is in [bold]{figures['head']}[/]"
    )
