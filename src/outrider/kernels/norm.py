"""Root-mean-square norm over the last dimension, alone or after a residual addition.

x and residual [..., H] of one type; weight [H] of any type. Each returns weight * x / sqrt(mean(x^2) + eps),
computed in float32 and given in x's type (Zhang and Sennrich, 2019, as Llama and Qwen apply it).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels._numba import KIND, SERIAL, Emitter, Int, Real, Vector, emitted
from outrider.kernels._threads import add, num_threads, parallel
from outrider.kernels.gpu.norm import add_rms_norm_gpu, rms_norm_gpu
from outrider.kernels.native import compiled
from outrider.kernels.op import Example, Op


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to residual in place, then norms residual."""
    return rms_norm_reference(residual.add_(x), weight, eps)


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


@compiled()
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


@compiled()
def _norm_kernel(
    x: int, residual: int, weight: int, kind: int, out: int, rows: int, size: int, eps: float, threads: int
) -> None:
    parallel(norm_rows, threads, (x, residual, weight, kind, out, rows, size, eps))


def _launch(x: Tensor, residual: int, weight: Tensor, eps: float) -> Tensor:
    assert x.dtype == torch.float32 and weight.is_contiguous()
    x = x.contiguous()
    out = torch.empty_like(x)
    numbers, size = x.numel(), len(weight)
    threads = num_threads() if numbers > SERIAL else 1
    kind = KIND[weight.dtype]
    _norm_kernel(x.data_ptr(), residual, weight.data_ptr(), kind, out.data_ptr(), numbers // size, size, eps, threads)
    return out


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, 0, weight, eps)


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert residual.dtype == torch.float32 and residual.is_contiguous() and residual.shape == x.shape
    return _launch(x, residual.data_ptr(), weight, eps)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, width in ((1, 256), (3, 67), (17, 1024)):
            x = torch.randn(rows, width, generator=generator)
            weight = 1 + torch.randn(width, generator=generator)
            x = x.to(device, torch.float32 if wide else dtype)
            yield {"x": x, "weight": weight.to(device, dtype), "eps": 1e-6}


def _add_examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for example in _examples(generator, device, wide):
        x = example["x"]
        residual = torch.randn(x.shape, generator=generator).to(device, x.dtype)
        yield {**example, "residual": residual}


RMS_NORM = Op("rms_norm", rms_norm_reference, {"cpu": _rms_norm_cpu, "cuda": rms_norm_gpu}, examples=_examples)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    add_rms_norm_reference,
    {"cpu": _add_rms_norm_cpu, "cuda": add_rms_norm_gpu},
    examples=_add_examples,
    outputs=("residual",),
)
