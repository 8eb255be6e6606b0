"""x @ weight.T + bias.

x [T, I] float32 on a CPU, of the weight's type on CUDA; weight [O, I] in its stored type; bias [O] or
None. Returns [T, O] of x's type, accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import llvmlite.binding
import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels._numba import FLOAT32, KIND, SERIAL, WIDTH, Emitter, Int, Vector, emitted
from outrider.kernels._threads import add, num_threads, parallel
from outrider.kernels.native import compiled
from outrider.kernels.op import Example, Op


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_FAST_BFLOAT16 = bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))
_FEW = 32  # rows up to which the kernel here is used
_HEIGHT, _WIDTH = 8, 8  # rows and outputs of a block
_LEAST, _MOST = 1 << 15, 1 << 20  # bytes of weights in a task: cheap to hand out, long enough to stream
_WIDENED = 1 << 22  # weights widened at once


@emitted
def _block(
    emitter: Emitter, x: Int, rows: Int, weight: Int, left: Int, size: Int, kind: Int, out: Int, outputs: Int
) -> None:
    """Up to 8 rows of x by the first 8 of the `left` outputs whose weights and results start here."""
    builder, number = emitter.builder, size.type
    until = builder.select(builder.icmp_signed("<", left, number(_WIDTH)), left, number(_WIDTH))

    def of_height(height: int) -> None:
        width = min(16 // height, _WIDTH)
        x_rows = emitter.rows(x, builder.mul(size, number(4)), height, rows)
        out_rows = emitter.rows(out, builder.mul(outputs, number(4)), height, rows)

        def of_kind(kind: int) -> None:
            stride = builder.mul(size, number(WIDTH[kind]))

            def tile(first: Int, state: list[Vector]) -> list[Vector]:
                rest = builder.sub(left, first)
                w_rows = emitter.rows(emitter.plus(weight, first, stride), stride, width, rest)
                places = [emitter.plus(row, first, number(4)) for row in out_rows]
                ahead = builder.mul(stride, number(_WIDTH))
                emitter.dots(x_rows, w_rows, size, places, kind, emitter.below(rest, width), ahead)
                return state

            emitter.loop(number(0), until, width, tile, [])

        emitter.each_kind(kind, of_kind)

    emitter.each_height(rows, of_height, (1, 2, 4, _HEIGHT))


@compiled()
def _blocks(
    tickets: int, x: int, weight: int, out: int, rows: int, inputs: int, outputs: int, kind: int, share: int
) -> None:
    """Weights are read from memory once: all rows pass them before the next block of outputs."""
    stride = inputs * (4 if kind == FLOAT32 else 2)
    while True:
        start = add(tickets, 1) * share
        if start >= outputs:
            break
        for o in range(start, min(start + share, outputs), _WIDTH):
            for row in range(0, rows, _HEIGHT):
                a, c = x + row * inputs * 4, out + (row * outputs + o) * 4
                _block(a, min(rows - row, _HEIGHT), weight + o * stride, outputs - o, inputs, kind, c, outputs)


@compiled()
def _few_rows(x: int, weight: int, out: int, rows: int, inputs: int, outputs: int, kind: int, threads: int) -> None:
    stride = inputs * (4 if kind == FLOAT32 else 2)
    task = min(max(outputs * stride // (4 * threads), _LEAST), _MOST)
    share = max(task // (stride * _WIDTH), 1) * _WIDTH
    parallel(_blocks, threads, (x, weight, out, rows, inputs, outputs, kind, share))


def _many_rows(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32:
        return functional.linear(x, weight)
    if weight.dtype == torch.bfloat16 and _FAST_BFLOAT16:
        return functional.linear(x.bfloat16(), weight).float()
    parts = weight.split(max(_WIDENED // weight.shape[1], 1))
    return torch.cat([functional.linear(x, part.float()) for part in parts], dim=1)


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, inputs = x.shape
    assert x.dtype == torch.float32 and weight.is_contiguous() and weight.shape[1] == inputs
    if rows > _FEW:
        out = _many_rows(x, weight)
    else:
        x, outputs = x.contiguous(), weight.shape[0]
        out = torch.empty(rows, outputs)
        threads = num_threads() if rows * inputs * outputs > SERIAL else 1
        _few_rows(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, inputs, outputs, KIND[weight.dtype], threads)
    return out if bias is None else out.add_(bias)


def _examples(generator: torch.Generator, device: torch.device) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, inputs, outputs in ((1, 64, 128), (1, 67, 5), (3, 129, 67), (17, 256, 131)):
            x = torch.randn(rows, inputs, generator=generator)
            weight = torch.randn(outputs, inputs, generator=generator)
            bias = torch.randn(outputs, generator=generator)
            x = x.to(device, torch.float32 if device.type == "cpu" else dtype)
            yield {"x": x, "weight": weight.to(device, dtype), "bias": bias.to(device, dtype)}
            yield {"x": x, "weight": weight.to(device, dtype)}


LINEAR = Op("linear", linear_reference, {"cpu": _linear_cpu}, examples=_examples)
