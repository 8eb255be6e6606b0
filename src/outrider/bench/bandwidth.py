"""What a device can do at best: read memory, and multiply matrices. The floors under every step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

HOST_SIZE, DEVICE_SIZE = 256 << 20, 1 << 30
"""Bytes read at a time, on a CPU and on a GPU: more than any cache holds."""


def read_bandwidth(device: torch.device, repeats: int = 8) -> float:
    """Bytes a second that memory gives at best: a large tensor reduced or, on a GPU, copied (both ways counted)."""
    size = DEVICE_SIZE if device.type == "cuda" else HOST_SIZE
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    found = size / min(_seconds(data.sum, device, repeats))
    if device.type == "cuda":
        other = torch.empty_like(data)
        found = max(found, 2 * size / min(_seconds(lambda: other.copy_(data), device, repeats)))
        del data, other
        torch.cuda.empty_cache()
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> float:
    """Floating-point operations a second of a large square product, a multiplication and an addition counted apart.

    The median, not the best: a GPU that multiplies for long lowers its clock.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    seconds = sorted(_seconds(lambda: left @ right, device, repeats))[repeats // 2]
    return 2 * size**3 / seconds


def _seconds(call: Callable[[], Tensor], device: torch.device, repeats: int) -> list[float]:
    """Of each of some calls, after two that are not counted."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    times: list[float] = []
    for repeat in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            spent = start.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            call()
            spent = time.perf_counter() - begun
        if repeat >= 2:
            times.append(spent)
    return times
