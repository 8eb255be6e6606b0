"""`kernels.norm` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.cpu.emit import KIND, SERIAL, Emitter, Int, Real, Vector, emitted
from outrider.kernels.cpu.jit import Kernel, task
from outrider.kernels.cpu.threads import add, num_threads, parallel


@emitted
def norm_row(emitter: Emitter, x: Int, weight: Int, kind: Int, out: Int, size: Int, eps: Real) -> None:
    """out[:size] = weight * x / rms(x); x and out float32, the same memory if the caller likes."""
    builder = emitter.builder

    def square(index: Int, mask: Vector | None, sums: list[Vector]) -> list[Vector]:
        value = emitter.load(x, index, mask)
        return [emitter.fma(value, value, sums[0])]

    total = emitter.first(emitter.fold(emitter.sweep(size, square, [emitter.floats(0)])))
    mean = builder.fdiv(total, builder.sitofp(size, total.type))
    root = emitter.sqrt(builder.fadd(mean, builder.fptrunc(eps, total.type)))
    factor = emitter.splat(builder.fdiv(total.type(1), root))

    def scale_by(kind: int) -> None:
        def scale(index: Int, mask: Vector | None, state: list[Vector]) -> list[Vector]:
            normed = builder.fmul(emitter.load(x, index, mask), factor)
            emitter.store(builder.fmul(emitter.load(weight, index, mask, kind), normed), out, index, mask)
            return []

        emitter.sweep(size, scale, [])

    emitter.each_kind(kind, scale_by)


@emitted
def _add_row(emitter: Emitter, x: Int, residual: Int, size: Int) -> None:
    def add(index: Int, mask: Vector | None, state: list[Vector]) -> list[Vector]:
        total = emitter.builder.fadd(emitter.load(residual, index, mask), emitter.load(x, index, mask))
        emitter.store(total, residual, index, mask)
        return []

    emitter.sweep(size, add, [])


@task()
def norm_rows(
    tickets: int, x: int, residual: int, weight: int, kind: int, out: int, rows: int, size: int, eps: float
) -> None:
    """Takes rows, one at a time; adds x to residual first and norms that, if there is one (0: there is none)."""
    while True:
        row = add(tickets, 1)
        if row >= rows:
            break
        start = row * size * 4
        source = x + start
        if residual != 0:
            _add_row(source, residual + start, size)
            source = residual + start
        norm_row(source, weight, kind, out + start, size, eps)


@Kernel
def _norm_kernel(
    x: int, residual: int, weight: int, kind: int, out: int, rows: int, size: int, eps: float, threads: int
) -> None:
    parallel(norm_rows, threads, (x, residual, weight, kind, out, rows, size, eps))


def _launch(x: Tensor, residual: int, weight: Tensor, eps: float) -> Tensor:
    assert x.dtype == torch.float32 and weight.is_contiguous()
    x = x.contiguous()
    out = torch.empty_like(x)
    numbers, size = x.numel(), weight.shape[0]
    threads = num_threads() if numbers > SERIAL else 1
    kind = KIND[weight.dtype]
    _norm_kernel.launch(
        x.data_ptr(), residual, weight.data_ptr(), kind, out.data_ptr(), numbers // size, size, eps, threads
    )
    return out


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, 0, weight, eps)


def add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert residual.dtype == torch.float32 and residual.is_contiguous() and residual.shape == x.shape
    return _launch(x, residual.data_ptr(), weight, eps)
