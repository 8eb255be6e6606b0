"""Every op's kernel beside its torch reference and its floor, at the sizes of a decode step of a model."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

import outrider.kernels
from outrider.bench.bandwidth import matmul_rate, read_bandwidth
from outrider.bench.kernel_cases import cases
from outrider.bench.kernel_sizes import Case, Sizes
from outrider.bench.provenance import provenance
from outrider.kernels.op import Op
from outrider.layers.parameter import activation_dtype
from outrider.models.config import ModelConfig

CALLS = 20
"""Calls recorded in a graph, at least: then what starting it costs shows in no call."""

LONG = 0.03
"""Seconds of a call after which one is enough: a reference that gathers a long context."""

ENOUGH, ROUNDS = 0.05, 9
"""Seconds that timing goes on for, and rounds of which it takes the median."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One op at one size. Times are microseconds of one call; None: there is no such kernel, or it failed."""

    op: str
    case: str
    rows: int  # sequences of the step
    kernel_us: float | None
    reference_us: float | None
    floor_us: float  # what it must move at the bandwidth, or compute at the matmul rate, measured in the same run
    num_bytes: int
    operations: int
    graph: bool  # whether the kernel was timed in a CUDA graph, as a step runs it
    errors: tuple[str, ...]


def bench_kernels(
    config: ModelConfig,
    name: str,
    device: torch.device,
    *,
    dtype: torch.dtype,
    rows: Sequence[int],
    num_drafts: int,
    context: int,
    prefill: int,
    only: Sequence[str] = (),  # names of ops; empty: all
    progress: Callable[[KernelRow], None] | None = None,
) -> dict[str, Any]:
    """Rows for every op and number of sequences. An op that fails is a row with the error, and the rest go on."""
    bandwidth, rate = read_bandwidth(device), matmul_rate(device, activation_dtype(device, dtype))
    found: list[KernelRow] = []
    for index, count in enumerate(rows):
        sizes = Sizes(config, count, num_drafts, context, 0 if index else prefill, device, dtype)
        for row in _rows(sizes, bandwidth, rate, set(only)):
            found.append(row)
            if progress is not None:
                progress(row)
    timed = {row.op for row in found}
    return {
        "config": {
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "num_drafts": num_drafts,
            "context": context,
            "prefill": prefill,
            "read_gb_per_second": bandwidth / 1e9,
            "matmul_tflops": rate / 1e12,
        },
        **provenance(device),
        "not_timed": [] if only else sorted(op.name for op in all_ops() if op.name not in timed),
        "rows": [asdict(row) for row in found],
    }


def all_ops() -> list[Op[..., Any]]:
    """Every op of `outrider.kernels`."""
    found: dict[str, Op[..., Any]] = {}
    for module in pkgutil.iter_modules(outrider.kernels.__path__, "outrider.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Op):
                found[value.name] = value
    return [*found.values()]


@torch.inference_mode()
def _rows(sizes: Sizes, bandwidth: float, rate: float, only: set[str]) -> Iterator[KernelRow]:
    for make in cases(sizes):
        try:
            case = make()
        except Exception as error:  # out of memory, say
            yield KernelRow(
                make.func.__name__.lstrip("_"), "", sizes.rows, None, None, 0.0, 0, 0, False, (_said(error),)
            )
            continue
        if not only or case.op.name in only:
            yield _row(case, sizes, bandwidth, rate)
        del case


def _row(case: Case, sizes: Sizes, bandwidth: float, rate: float) -> KernelRow:
    op, device = case.op, sizes.device
    kernel = case.kernel or op.on(device)
    errors: list[str] = []
    times: list[tuple[float, bool] | None] = []
    for what in (None if kernel is op.reference else kernel, op.reference):
        try:
            times.append(None if what is None else _time(what, case.copies, device))
        except Exception as error:
            times.append(None)
            errors.append(_said(error))
    ours, theirs = times
    return KernelRow(
        op=op.name,
        case=case.name,
        rows=sizes.rows,
        kernel_us=None if ours is None else 1e6 * ours[0],
        reference_us=None if theirs is None else 1e6 * theirs[0],
        floor_us=1e6 * max(case.num_bytes / bandwidth, case.operations / rate),
        num_bytes=case.num_bytes,
        operations=case.operations,
        graph=ours is not None and ours[1],
        errors=tuple(errors),
    )


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _time(function: Callable[..., Any], copies: Sequence[dict[str, Any]], device: torch.device) -> tuple[float, bool]:
    """Seconds of a call, and whether calls were recorded in a graph."""

    def call(number: int) -> None:
        function(**copies[number % len(copies)])

    if device.type != "cuda":
        return _time_on_host(call), False
    with torch.cuda.device(device):
        call(0)  # compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(0)
        torch.cuda.synchronize()
        if (spent := time.perf_counter() - start) > LONG:
            return spent, False
        calls = -(-CALLS // len(copies)) * len(copies)

        def once() -> None:
            for number in range(calls):
                call(number)

        if _reads_on_host(call):
            return time_on_device(once) / calls, False
        return time_on_device(recorded(once).replay) / calls, True


def _reads_on_host(call: Callable[[int], None]) -> bool:
    """Whether a call waits for the device, as no recorded one may: found out before a recording breaks."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def recorded(once: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what a call gives the device; it is called twice."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph


def time_on_device(call: Callable[[], None]) -> float:
    """Seconds of the device's time that a call takes, the median of several."""
    call()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < ROUNDS or (time.perf_counter() - begun < ENOUGH and len(times) < 100 * ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _time_on_host(call: Callable[[int], Any]) -> float:
    call(0)  # compiles
    times: list[float] = []
    begun = time.perf_counter()
    while not times or (len(times) < 1000 and time.perf_counter() - begun < ENOUGH):
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return median(times)
