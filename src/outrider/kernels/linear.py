"""x @ weight.T + bias.

x [T, I] float32 on a CPU, of the weight's type on CUDA; weight [O, I] in its stored type; bias [O] or
None. Returns [T, O] of x's type, accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels._numba import KIND, SERIAL, dot_tile
from outrider.kernels._threads import add, num_threads, parallel
from outrider.kernels.native import compiled
from outrider.kernels.op import Example, Op


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_FEW = 16
_SHARE = 1 << 14  # weights at least in a task

_tile_1, _tile_2, _tile_4, _tile_8 = (dot_tile(rows, outputs) for rows, outputs in ((1, 8), (2, 8), (4, 4), (8, 2)))


@compiled()
def _few_outputs(x: int, weight: int, out: int, rows: int, inputs: int, outputs: int, kind: int, first: int) -> None:
    """Eight outputs, or what is left of them, for all rows: their weights are read from memory once."""
    width = 4 if kind == 0 else 2
    ahead = 8 * inputs * width
    for row in range(0, rows, 8):
        last_row = rows - 1 - row
        a, b = x + row * inputs * 4, out + row * outputs * 4
        for o in range(first, min(first + 8, outputs), 8 if last_row < 2 else 4 if last_row < 4 else 2):
            w, c, last = weight + o * inputs * width, b + o * 4, outputs - 1 - o
            if last_row == 0:
                _tile_1(a, inputs * 4, 0, w, inputs * width, last, inputs, kind, c, outputs * 4, ahead)
            elif last_row == 1:
                _tile_2(a, inputs * 4, 1, w, inputs * width, last, inputs, kind, c, outputs * 4, ahead)
            elif last_row < 4:
                _tile_4(a, inputs * 4, last_row, w, inputs * width, last, inputs, kind, c, outputs * 4, ahead)
            else:
                _tile_8(a, inputs * 4, last_row, w, inputs * width, last, inputs, kind, c, outputs * 4, ahead)


@compiled()
def _outputs(
    tickets: int, x: int, weight: int, out: int, rows: int, inputs: int, outputs: int, kind: int, share: int
) -> None:
    while True:
        start = add(tickets, 1) * share
        if start >= outputs:
            break
        for first in range(start, min(start + share, outputs), 8):
            _few_outputs(x, weight, out, rows, inputs, outputs, kind, first)


@compiled()
def _few_rows(
    x: int, weight: int, out: int, rows: int, inputs: int, outputs: int, kind: int, threads: int
) -> None:
    share = max(outputs // 512, _SHARE // inputs // 8, 1) * 8
    parallel(_outputs, threads, (x, weight, out, rows, inputs, outputs, kind, share))


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, inputs = x.shape
    outputs = len(weight)
    if rows > _FEW:
        return linear_reference(x, weight, bias)
    assert x.dtype == torch.float32 and weight.is_contiguous() and weight.shape[1] == inputs
    x = x.contiguous()
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
