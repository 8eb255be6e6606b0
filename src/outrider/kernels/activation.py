"""The gate of a SwiGLU block (Shazeer, 2020): silu(first half) * second half of the last dimension.

gate_up [T, 2*I]. Returns [T, I] of its type, computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels._numba import SERIAL, Emitter, Int, Vector, emitted
from outrider.kernels._threads import add, num_threads, parallel
from outrider.kernels.gpu.activation import silu_mul_gpu
from outrider.kernels.native import compiled
from outrider.kernels.op import Example, Op


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def silu_mul(emitter: Emitter, gate: Vector, up: Vector) -> Vector:
    """silu(gate) * up."""
    builder = emitter.builder
    denominator = builder.fadd(emitter.exp(builder.fneg(gate)), emitter.floats(1))
    return builder.fmul(builder.fdiv(gate, denominator), up)


@emitted
def _gate_row(emitter: Emitter, gate: Int, up: Int, out: Int, size: Int) -> None:
    """out[:size] = silu(gate) * up, all float32."""

    def step(index: Int, mask: Vector | None, state: list[Vector]) -> list[Vector]:
        product = silu_mul(emitter, emitter.load(gate, index, mask), emitter.load(up, index, mask))
        emitter.store(product, out, index, mask)
        return []

    emitter.sweep(size, step, [])


@compiled()
def gate_rows(tickets: int, gate_up: int, out: int, rows: int, size: int) -> None:
    """Takes rows, one at a time."""
    while True:
        row = add(tickets, 1)
        if row >= rows:
            break
        gate = gate_up + row * size * 8
        _gate_row(gate, gate + size * 4, out + row * size * 4, size)


@compiled()
def _gate_kernel(gate_up: int, out: int, rows: int, size: int, threads: int) -> None:
    parallel(gate_rows, threads, (gate_up, out, rows, size))


def _silu_mul_cpu(gate_up: Tensor) -> Tensor:
    assert gate_up.dtype == torch.float32 and gate_up.is_contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size)
    threads = num_threads() if rows * size > SERIAL else 1
    _gate_kernel(gate_up.data_ptr(), out.data_ptr(), rows, size, threads)
    return out


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, width in ((1, 768), (3, 67), (17, 129)):
        for dtype in (torch.float32,) if wide else (torch.bfloat16, torch.float16, torch.float32):
            yield {"gate_up": (8 * torch.randn(rows, 2 * width, generator=generator)).to(device, dtype)}


SILU_MUL = Op("silu_mul", silu_mul_reference, {"cpu": _silu_mul_cpu, "cuda": silu_mul_gpu}, examples=_examples)
