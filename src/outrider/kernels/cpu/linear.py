"""`kernels.linear` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.cpu import amx
from outrider.kernels.cpu.addresses import Product
from outrider.kernels.cpu.emit import BFLOAT16, FLOAT32, KIND, SERIAL, WIDTH, Emitter, Int, Vector, emitted
from outrider.kernels.cpu.jit import Kernel, larger, smaller, task
from outrider.kernels.cpu.threads import add, num_threads, parallel

FEW = 32  # rows up to which the vector kernel is used: torch needs some 30 us to start
_HEIGHT, _WIDTH = 8, 8  # rows and outputs of a block
_PAIR = 2  # outputs at once: more would be more streams of memory, fewer would load x more often
_MIN_TASK, _MAX_TASK = 1 << 15, 1 << 20  # bytes of weights in a task: cheap to hand out, long enough to stream
_WIDENED = 1 << 22  # weights widened at once


@emitted
def _block(
    emitter: Emitter, x: Int, rows: Int, weight: Int, left: Int, size: Int, kind: Int, out: Int, outputs: Int
) -> None:
    """Up to 8 rows of x by the first 8 of the `left` outputs whose weights and results start here."""
    until = emitter.minimum(left, _WIDTH)

    def of_height(height: int) -> None:
        x_rows = emitter.rows(x, emitter.times(size, 4), height, rows)
        out_rows = emitter.rows(out, emitter.times(outputs, 4), height, rows)

        def of_kind(kind: int) -> None:
            stride = emitter.times(size, WIDTH[kind])

            def tile(first: Int, state: list[Vector]) -> list[Vector]:
                rest = emitter.builder.sub(left, first)
                w_rows = emitter.rows(emitter.plus(weight, first, stride), stride, _PAIR, rest)
                addresses = [emitter.plus(row, first, 4) for row in out_rows]
                ahead = emitter.times(stride, 2 * _PAIR)
                emitter.dots(x_rows, w_rows, size, addresses, kind, emitter.below(rest, _PAIR), ahead)
                return state

            emitter.loop(0, until, _PAIR, tile, [])

        emitter.each_kind(kind, of_kind)

    emitter.each_height(rows, of_height, (1, 2, 4, 6, _HEIGHT))


@emitted
def _add_bias(emitter: Emitter, out: Int, bias: Int, kind: Int, size: Int) -> None:
    def of_kind(kind: int) -> None:
        def step(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
            total = emitter.builder.fadd(emitter.load(out, index, mask), emitter.load(bias, index, mask, kind))
            emitter.store(total, out, index, mask)
            return none

        emitter.sweep(size, step, [])

    emitter.each_kind(kind, of_kind)


@task()
def few_rows(tickets: int, x: int, product: Product, out: int, rows: int, threads: int) -> None:
    """Weights are read from memory once: all rows pass them before the next block of outputs."""
    weight, bias, inputs, outputs, kind = product
    stride = inputs * (4 if kind == FLOAT32 else 2)
    size = smaller(larger(outputs * stride // (4 * threads), _MIN_TASK), _MAX_TASK)
    share = larger(size // (stride * _WIDTH), 1) * _WIDTH
    while True:
        start = add(tickets, 1) * share
        if start >= outputs:
            break
        for o in range(start, smaller(start + share, outputs), _WIDTH):
            for row in range(0, rows, _HEIGHT):
                a, c = x + row * inputs * 4, out + (row * outputs + o) * 4
                _block(a, smaller(rows - row, _HEIGHT), weight + o * stride, outputs - o, inputs, kind, c, outputs)
            for row in range(rows if bias != 0 else 0):
                address = bias + o * stride // inputs
                _add_bias(out + (row * outputs + o) * 4, address, kind, smaller(outputs - o, _WIDTH))


@Kernel
def _few_rows_kernel(x: int, product: Product, out: int, rows: int, threads: int) -> None:
    parallel(few_rows, threads, (x, product, out, rows, threads))


def _many_rows(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32:
        return functional.linear(x, weight)
    parts = torch.split(weight, max(_WIDENED // weight.shape[1], 1))
    return torch.cat([functional.linear(x, part.float()) for part in parts], dim=1)


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, upcast: bool = True) -> Tensor:
    (rows, inputs), outputs, kind = x.shape, weight.shape[0], KIND[weight.dtype]
    assert x.dtype == torch.float32 and weight.is_contiguous() and (bias is None or bias.dtype == weight.dtype)
    if not rows:
        return torch.empty(0, outputs)
    tiled = amx.AVAILABLE and kind == BFLOAT16 and amx.fits(inputs, outputs)
    if rows > FEW and not tiled:
        out = _many_rows(x, weight)
        return out if bias is None else out.add_(bias)
    x = x.contiguous()
    out = torch.empty(rows, outputs)
    product = Product(weight.data_ptr(), 0 if bias is None else bias.data_ptr(), inputs, outputs, kind)
    threads = num_threads() if rows * inputs * outputs > SERIAL else 1
    if tiled:
        amx.multiply.launch(x.data_ptr(), product, out.data_ptr(), rows, threads)
    else:
        _few_rows_kernel.launch(x.data_ptr(), product, out.data_ptr(), rows, threads)
    return out
