"""`outrider train`: a draft head for any supported target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from outrider import env
from outrider.acceptance.records import RECORDS, Expectation, write_record
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.cli.common import Json, Model, counting, err, out, print_json, table
from outrider.cli.flags import with_flags
from outrider.core.sampling import SamplingParams
from outrider.train.options import TrainOptions


@with_flags(TrainOptions, "training", skip=("model",))
def train(
    training: TrainOptions,
    model: Model = None,
    accept_prompts: Annotated[
        int, typer.Option(min=0, help="held-out code prompts on which acceptance is recorded beside the head; 0: none")
    ] = 64,
    as_json: Json = False,
) -> None:
    """Train a draft head for a target and write it in the speculators format."""
    from outrider.train import run

    silent = as_json or env.process()[0] > 0
    with counting("continuations", quiet=silent or training.on_policy is None) as count, _training(silent) as report:
        figures = run.train(replace(training, model=model), report, count)
    if env.process()[0] > 0:
        return
    if accept_prompts and "head" in figures:
        with counting("prompts", quiet=as_json) as count:
            figures["acceptance"] = _record_acceptance(replace(training, model=model), accept_prompts, count)
    if as_json:
        print_json(figures)
    else:
        _print(figures)


def _record_acceptance(
    options: TrainOptions, num_prompts: int, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Runs the new head on the prompts that `outrider accept` takes unasked, and leaves acceptance.json beside it."""
    from outrider.bench.acceptance import measure, setting_of_run
    from outrider.engine.llm import LLM

    assert options.out is not None
    head, prompts = Path(options.out), read_prompts(HELD_OUT).first(num_prompts)
    sampling = SamplingParams(temperature=0.0, max_tokens=128)
    config = {"model": str(head), "num_speculative_tokens": options.num_speculative_tokens}
    with LLM(options.model, device=options.device, speculative_config=config) as llm:
        setting = setting_of_run(llm, prompts, sampling)
        report = measure(llm, prompts, sampling, progress)
    if report.drafts:
        write_record(head / RECORDS, Expectation.of(setting, report))
    return report.to_dict()


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
        rows = table("held-out documents", "position", "accuracy", "KL in nats")
        by_depth = zip(held_out["accuracy_by_depth"], held_out["loss_by_depth"], strict=True)
        for position, (accuracy, loss) in enumerate(by_depth, start=1):
            rows.add_row(str(position), f"{accuracy:.3f}", f"{loss:.3f}")
        out.print(rows)
    out.print(
        f"{figures['steps']} steps, {figures['tokens']} tokens, {figures['seconds']:.0f} s; "
        f"the head is in [bold]{figures['head']}[/]"
    )
