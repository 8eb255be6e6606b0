"""`outrider bench`: figures with provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.bench.prompts import read_prompts
from outrider.cli.bench_report import print_kernels, print_prefill, print_speed
from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    drafting_flags,
    engine_flags,
    engine_flags_with,
    engine_options,
    err,
    loading,
    print_json,
)
from outrider.errors import InputError, OptionError, nearest
from outrider.options import EngineOptions

if TYPE_CHECKING:
    import torch

    from outrider.bench.kernels import KernelRow
    from outrider.bench.speed import Workload

app = typer.Typer(
    help="Measure speed; every figure comes with its command, commit, device and versions.", no_args_is_help=True
)

InputLen = Annotated[int, typer.Option(min=1, help="tokens of each prompt")]
OutputLen = Annotated[int, typer.Option(min=1, help="tokens generated for each")]
Prompts = Annotated[Path | None, typer.Option(help="JSONL file with a prompt a line; left out: random tokens")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="cut a run off after so many steps in which all sequences decode")
]
Parts = Annotated[
    bool | None,
    typer.Option("--parts/--no-parts", help="time a step's parts on the device, in a run of their own; on a GPU yes"),
]
Output = Annotated[Path | None, typer.Option(help="file to write the JSON object to as well")]


@app.command("latency")
@engine_flags_with(max_num_seqs=1)
@drafting_flags
def latency(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 256,
    prompts: Prompts = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs to take figures over")] = 5,
    steps: Steps = None,
    parts: Parts = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """One sequence at a time: time to the first token, and a decode step beside its floor."""
    options = engine_options(engine, drafting, model, drafts=False)
    _bench_speed(options, _workload(input_len, output_len, prompts, steps), [1], repeats, parts, output, as_json)


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
    steps: Steps = None,
    parts: Parts = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Many sequences at once: output tokens a second at each concurrency."""
    wanted = _counts(concurrency, "--concurrency")
    options = engine_options(engine, drafting, model, drafts=False)
    _bench_speed(options, _workload(input_len, output_len, prompts, steps), wanted, repeats, parts, output, as_json)


@app.command("prefill")
@engine_flags_with(max_num_seqs=8)
@drafting_flags
def prefill(
    engine: EngineOptions,
    drafting: Drafting,
    model: Model = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="prompts that arrive at once")] = 8,
    input_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of each prompt; left out: 2048, or as many as fit")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of which the median is taken")] = 3,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Prompts only: tokens a second, and the share of the device's rate for one large matrix product."""
    options = engine_options(engine, drafting, model, drafts=False)
    from outrider.bench.prefill import bench_prefill
    from outrider.engine.llm import LLM

    with loading(quiet=as_json) as callbacks:
        llm = LLM.from_options(options, *callbacks)
    with llm:
        input_len = input_len or min(2048, llm.engine.resolved.runner.sizes.max_model_len - 1)
        _report(bench_prefill(llm, num_prompts, input_len, repeats), print_prefill, output, as_json)


@app.command("kernels")
def kernels(
    model: Model = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the weights; auto: the checkpoint's")] = "auto",
    rows: Annotated[str, typer.Option(help="sequences of a step, several as 1,8,32")] = "1,8,32",
    num_speculative_tokens: Annotated[int, typer.Option("-k", min=1, help="drafts each of them verifies")] = 7,
    context: Annotated[int, typer.Option(min=1, help="tokens each of them holds")] = 512,
    prefill: Annotated[int, typer.Option(min=0, help="tokens of the prompt that attention is timed on")] = 2048,
    op: Annotated[list[str] | None, typer.Option(help="time this op only; may be repeated")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Each op's kernel beside its torch reference and its floor, at a model's sizes. Needs no weights."""
    from outrider.bench.kernels import bench_kernels
    from outrider.load.checkpoint import read_json
    from outrider.load.hub import locate
    from outrider.models.config import DTYPES
    from outrider.models.registry import read_config

    counts = _counts(rows, "--rows")
    directory = locate(model)
    _, config = read_config(read_json(directory / "config.json"))
    if dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"unknown dtype: {dtype} ({nearest(dtype, ['auto', *DTYPES])})")

    def say(row: KernelRow) -> None:
        if err.is_terminal and not as_json:
            err.print(f"[dim]{row.op} {row.case}[/]")

    result = bench_kernels(
        config,
        str(directory),
        _device(device),
        dtype=config.dtype if dtype == "auto" else DTYPES[dtype],
        rows=counts,
        num_drafts=num_speculative_tokens,
        context=context,
        prefill=prefill,
        only=op or (),
        progress=say,
    )
    _report(result, print_kernels, output, as_json)


def _counts(given: str, flag: str) -> list[int]:
    try:
        wanted = [int(part) for part in given.split(",")]
    except ValueError:
        raise OptionError(f"{flag} must be numbers with commas between: {given}") from None
    if min(wanted) < 1:
        raise OptionError(f"{flag} must be 1 or more: {given}")
    return wanted


def _device(name: str) -> torch.device:
    """As the engine's option names it."""
    from outrider.bench.speed import device_of

    try:
        device = device_of(EngineOptions(device=name))
    except RuntimeError:  # torch's word for a GPU that is not there
        device = None
    if device is None or name not in ("auto", device.type, str(device)):
        raise OptionError(f"no such device: {name} (known: auto, cpu, cuda, cuda:N)")
    return device


def _workload(input_len: int, output_len: int, prompts: Path | None, steps: int | None) -> Workload:
    from outrider.bench.speed import Workload

    return Workload(input_len, output_len, None if prompts is None else read_prompts(prompts), steps)


def _bench_speed(
    options: EngineOptions,
    workload: Workload,
    concurrency: list[int],
    repeats: int,
    parts: bool | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from outrider.bench.speed import bench

    with loading(quiet=as_json) as callbacks:
        result = bench(options, workload, concurrency, repeats, parts=parts, progress=callbacks)
    _report(result, print_speed, output, as_json)


def _report(
    result: Mapping[str, Any], show: Callable[[Mapping[str, Any]], None], output: Path | None, as_json: bool
) -> None:
    if as_json:
        print_json(result)
    else:
        show(result)
    if output is not None:
        try:
            output.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write --output: {error}") from error
