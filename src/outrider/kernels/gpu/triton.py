"""Triton, if it is installed, and what all kernels of this folder share.

A kernel of one step is launched while the one before it still runs (programmatic dependent launch): its programs take
their places, ask for weights, and wait. So each begins with `begin(PDL)`, may then touch nothing but constants
(weights), and calls `wait(PDL)` before it reads or writes anything else. One with nothing to do may return at once, as
long as another of its kernel waits: a kernel has ended once all its programs have, so order is kept. A launcher passes
`PDL=flag` to the kernel and `**launch(flag)` to the launch, with `flag = overlaps(tensor)`. A kernel that waits before
it begins lets the one behind it read, before that waits, whatever was written before this one: all is over by then.

With TRITON_INTERPRET=1 in the environment Triton runs kernels as Python, on tensors of a CPU: so the tests do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from outrider.kernels.gpu.disk_cache import writable
from outrider.kernels.op import HAS_TRITON

if HAS_TRITON or TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = tl = None

__all__ = [
    "INTERPRETED",
    "ask_for",
    "begin",
    "dot",
    "is_roomy",
    "jit",
    "jit_counts",
    "launch",
    "next_power_of_2",
    "overlaps",
    "round_to",
    "tl",
    "wait",
]

_ROOMY = (8, 0), (9, 0), (10, 0), (10, 3)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself, never to be called, where there is no Triton."""
    return triton.jit(function) if HAS_TRITON else function


def jit_counts(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` for a kernel with arguments that differ from step to step, named here.

    For others Triton compiles a kernel of its own where they are 1, and where they are multiples of 16.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=counts) if HAS_TRITON else function

    return decorate


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


@cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlaps(x: torch.Tensor) -> bool:
    """Whether kernels on this tensor's device may start before the one in front has ended (Hopper and later)."""
    return x.is_cuda and _overlaps(x.device.index)


@cache
def is_roomy(device: torch.device) -> bool:
    """Whether a program may have 160 KiB of shared memory, more than half of what a multiprocessor has."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _ROOMY


def launch(overlap: bool) -> dict[str, Any]:
    """Keyword arguments of a launch; with overlap the kernel may start before the one in front has ended."""
    return {"launch_pdl": True} if overlap else {}


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret)) if HAS_TRITON else None

if HAS_TRITON and torch.cuda.is_available():
    triton.knobs.cache.dir = writable(triton.knobs.cache.dir)


@jit
def dot(a, b, total):
    """a @ b + total, float32, with no more rounding than the operands' own; Triton's interpreter knows no bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def round_to(value, dtype: tl.constexpr):
    """float32 rounded to dtype, to the nearest, as a GPU rounds; Triton's interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@jit
def begin(PDL: tl.constexpr):
    """Lets the next kernel take its places."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait(PDL: tl.constexpr):
    """Until the kernel in front has ended and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def ask_for(start, at, size, limit):
    """Asks for `size` bytes, a multiple of 16, from each start + at [N] below start + limit on, into the L2 cache.

    Nothing waits for them. Hopper's, as overlap is; not interpreted.
    """
    address = start.to(tl.int64) + at
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [address, tl.zeros_like(at) + size, (at + size <= limit).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
