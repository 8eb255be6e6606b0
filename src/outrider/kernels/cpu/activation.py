"""`kernels.activation` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.cpu.emit import SERIAL, Emitter, Int, Vector, emitted
from outrider.kernels.cpu.jit import Kernel, task
from outrider.kernels.cpu.threads import add, num_threads, parallel


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


@task()
def gate_rows(tickets: int, gate_up: int, out: int, rows: int, size: int) -> None:
    """Takes rows, one at a time."""
    while True:
        row = add(tickets, 1)
        if row >= rows:
            break
        gate = gate_up + row * size * 8
        _gate_row(gate, gate + size * 4, out + row * size * 4, size)


@Kernel
def _gate_kernel(gate_up: int, out: int, rows: int, size: int, threads: int) -> None:
    parallel(gate_rows, threads, (gate_up, out, rows, size))


def silu_mul_cpu(gate_up: Tensor) -> Tensor:
    assert gate_up.dtype == torch.float32 and gate_up.is_contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size)
    threads = num_threads() if rows * size > SERIAL else 1
    _gate_kernel.launch(gate_up.data_ptr(), out.data_ptr(), rows, size, threads)
    return out
