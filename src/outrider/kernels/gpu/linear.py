"""Products of few rows, and what stands before and behind them in a decoder layer. See `kernels.linear`.

With few rows a product is a read of its weights: each program takes a few outputs and reads their weights once, all rows
beside them. What is cheap is done on the way: the norm of the rows, the gate, the sum with the residual stream.

Up to ROWS rows are multiplied in registers, without tensor cores. A program's first weights are in registers before it
waits for the kernel in front, so that memory does not rest while kernels change; where a program has no more weights
than that, what is left of the kernel behind the wait is a read of x and a sum. The norm is done in the loop.

Up to FEW rows go through tensor cores. There a norm in the loop took three times as long, so that half of it is done by
the product before: one that adds to the residual stream also leaves the stream times the next norm's weight, and each
program's sums of squares; the product that reads those scales its results. More rows are cuBLAS's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.gpu.triton import begin, dot, jit, launch, next_power_of_2, overlaps, tl, wait

ROWS = 4
"""Rows up to which a product is made without tensor cores."""

FEW = 16
"""Rows up to which these kernels are used."""


EARLY = False


class Cut(NamedTuple):
    """How a product is shared out: outputs of a program, parts of the inputs summed apart, inputs of a part's step."""

    width: int
    parts: int
    depth: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Rows that are normed in part: times the norm's weight, but not yet divided by their root mean square."""

    scaled: Tensor  # [T, H]
    squares: Tensor  # [sums, T] float32, which add up to each row's sum of squares
    eps: float


@cache
def _num_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def cut_for(x: Tensor, outputs: int, *, gate: bool = False) -> Cut:
    """A rule that was measured on an H100 at the shapes of Qwen3 (docs/journal.md)."""
    programs = _num_multiprocessors(x.device.index) if x.is_cuda else 4
    deep = x.shape[1] >= 4096
    most = 24 if gate and deep else 12 if gate else 16
    width = -(-outputs // (programs * -(-outputs // (programs * most))))
    if x.itemsize > 2:
        return Cut(width, 1, 64, 4, 2)
    return Cut(width, 2, 128, 4, 3) if gate and deep else Cut(width, 4, 128, 4, 3)


@jit
def _few_rows_kernel(
    x,
    weight,
    bias,
    squares,
    out,
    next_norm,
    next_scaled,
    next_squares,
    rows,
    outputs,
    inputs,
    width,
    num_sums,
    eps,
    NORM: tl.constexpr,  # divide by the root mean square of the rows, whose squares are given
    GATE: tl.constexpr,  # silu of an output times the one `outputs` behind it
    ADD: tl.constexpr,  # out is added to, not written
    NEXT: tl.constexpr,  # leave out times next_norm, and its sums of squares
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # the inputs are whole steps
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if EARLY:
        begin(PDL)
    tile = tl.program_id(0)
    first = tile * width
    up = weight + outputs.to(tl.int64) * inputs
    row, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    column = first + lane
    own = (lane < width) & (column < outputs)
    step = tl.arange(0, PARTS)[:, None, None] * BLOCK_K
    across, down = tl.arange(0, BLOCK_K)[None, None, :] + step, tl.arange(0, BLOCK_K)[None, :, None] + step
    x_at = x + row[None, :, None] * inputs + across
    place = tl.minimum(column, outputs - 1).to(tl.int64)[None, None, :] * inputs + down
    x_mask, w_mask = (row < rows)[None, :, None], own[None, None, :]
    total = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    total_up = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    valid = (row < rows)[:, None] & own[None, :]
    at = row[:, None].to(tl.int64) * outputs + column[None, :]
    if NEXT:
        scale = tl.load(next_norm + column, mask=own, other=0).to(tl.float32)[None, :]
    wait(PDL)
    if ADD:
        before = tl.load(out + at, mask=valid, other=0).to(tl.float32)
    if NORM:
        sums = tl.arange(0, BLOCK_S)
        mask = (sums < num_sums)[:, None] & (row < rows)[None, :]
        square = tl.sum(tl.load(squares + sums[:, None] * rows + row[None, :], mask=mask, other=0), axis=0)
    for k in range(0, inputs, PARTS * BLOCK_K):
        if EVEN:
            value = tl.load(x_at + k, mask=x_mask, other=0)
            gate = tl.load(weight + place + k, mask=w_mask, other=0)
        else:
            value = tl.load(x_at + k, mask=x_mask & (across + k < inputs), other=0)
            gate = tl.load(weight + place + k, mask=w_mask & (down + k < inputs), other=0)
        total = dot(value, gate, total)
        if GATE:
            if EVEN:
                raised = tl.load(up + place + k, mask=w_mask, other=0)
            else:
                raised = tl.load(up + place + k, mask=w_mask & (down + k < inputs), other=0)
            total_up = dot(value, raised, total_up)
    if not EARLY:
        begin(PDL)
    result = tl.sum(total, axis=0)
    if NORM:
        root = tl.rsqrt(square / inputs + eps)[:, None]
        result *= root
    if BIAS:
        result += tl.load(bias + column, mask=own, other=0).to(tl.float32)[None, :]
    if GATE:
        result = result / (1 + tl.exp(-result)) * (tl.sum(total_up, axis=0) * root)
    if ADD:
        result += before
    stored = result.to(out.dtype.element_ty)
    tl.store(out + at, stored, mask=valid)
    if NEXT:
        wide = tl.where(valid, stored.to(tl.float32), 0)
        tl.store(next_scaled + at, (wide * scale).to(out.dtype.element_ty), mask=valid)
        tl.store(next_squares + tile * rows + row, tl.sum(wide * wide, axis=1), mask=row < rows)


@jit
def _finish(total, raised, square, inputs, eps, out, at, more, own, NORM: tl.constexpr, GATE: tl.constexpr):
    """One row's results, from the sums of its products to memory."""
    result = tl.sum(total, axis=1)
    root = tl.rsqrt(tl.sum(square) / inputs + eps) if NORM else 1.0
    result = result * root + more
    if GATE:
        result = result / (1 + tl.exp(-result)) * (tl.sum(raised, axis=1) * root)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=own)


@jit
def _in_registers_kernel(
    x,
    weight,
    bias,
    norm,
    out,
    outputs,
    inputs,
    eps,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,  # 1 to 4
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if EARLY:
        begin(PDL)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = column < outputs
    place = tl.arange(0, BLOCK_K)
    w_at = weight + tl.minimum(column, outputs - 1).to(tl.int64)[:, None] * inputs + place[None, :]
    ahead = outputs.to(tl.int64) * inputs  # from an output of the gate to its other half
    inside = place < inputs
    w = tl.load(w_at, mask=inside[None, :], other=0)
    if GATE:
        up = tl.load(w_at + ahead, mask=inside[None, :], other=0)
    if NORM:
        scale = tl.load(norm + place, mask=inside, other=0)
    more = tl.load(bias + column, mask=own, other=0).to(tl.float32) if BIAS else 0.0
    total0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total1, total2, total3 = total0, total0, total0
    raised0, raised1, raised2, raised3 = total0, total0, total0, total0
    square0 = tl.zeros([BLOCK_K], tl.float32)
    square1, square2, square3 = square0, square0, square0
    wait(PDL)
    for k in range(0, inputs, BLOCK_K):
        beyond = place + k + BLOCK_K < inputs
        w_next = tl.load(w_at + k + BLOCK_K, mask=beyond[None, :], other=0)
        if GATE:
            up_next = tl.load(w_at + ahead + k + BLOCK_K, mask=beyond[None, :], other=0)
        if NORM:
            scale_next = tl.load(norm + place + k + BLOCK_K, mask=beyond, other=0)
        known = place + k < inputs
        wide = w.to(tl.float32)
        if GATE:
            wide_up = up.to(tl.float32)
        for row in tl.static_range(ROWS):
            value = tl.load(x + row * inputs + place + k, mask=known, other=0).to(tl.float32)
            square = value * value
            if NORM:
                value = (value * scale.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
            product = wide * value[None, :]
            if GATE:
                raised = wide_up * value[None, :]
            if row == 0:
                total0 += product
                if NORM:
                    square0 += square
                if GATE:
                    raised0 += raised
            if row == 1:
                total1 += product
                if NORM:
                    square1 += square
                if GATE:
                    raised1 += raised
            if row == 2:
                total2 += product
                if NORM:
                    square2 += square
                if GATE:
                    raised2 += raised
            if row == 3:
                total3 += product
                if NORM:
                    square3 += square
                if GATE:
                    raised3 += raised
        w = w_next
        if GATE:
            up = up_next
        if NORM:
            scale = scale_next
    if not EARLY:
        begin(PDL)
    for row in tl.static_range(ROWS):
        at = row * outputs + column
        if ADD:
            more = tl.load(out + at, mask=own, other=0).to(tl.float32)
        if row == 0:
            _finish(total0, raised0, square0, inputs, eps, out, at, more, own, NORM, GATE)
        if row == 1:
            _finish(total1, raised1, square1, inputs, eps, out, at, more, own, NORM, GATE)
        if row == 2:
            _finish(total2, raised2, square2, inputs, eps, out, at, more, own, NORM, GATE)
        if row == 3:
            _finish(total3, raised3, square3, inputs, eps, out, at, more, own, NORM, GATE)


def in_registers(
    x: Tensor,  # [T, I], at most ROWS rows
    weight: Tensor,  # [O, I], or [2*O, I] with `gate`
    out: Tensor,  # [T, O]
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,  # [I]
    eps: float = 0.0,
    gate: bool = False,
    add: bool = False,
    cut: tuple[int, int, int] | None = None,  # outputs of a program, inputs of a step, warps
) -> None:
    """out, or out +, (norm of) x @ weight.T + bias, or the gate of its halves."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    assert rows <= ROWS and x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert out.shape == (rows, outputs) and weight.shape[1] == inputs and weight.dtype == x.dtype
    assert not (add and bias is not None)
    width, depth, warps = cut or (4, 1024 if rows <= 2 else 512, 4)
    depth = min(depth, next_power_of_2(inputs))
    overlap = overlaps(x)
    _in_registers_kernel[(-(-outputs // width),)](
        x,
        weight,
        bias,
        norm,
        out,
        outputs,
        inputs,
        eps,
        NORM=norm is not None,
        GATE=gate,
        ADD=add,
        BIAS=bias is not None,
        ROWS=rows,
        BLOCK_N=width,
        BLOCK_K=depth,
        EARLY=EARLY,
        PDL=overlap,
        num_warps=warps,
        **launch(overlap),
    )


@jit
def _scale_kernel(x, residual, norm, scaled, squares, size, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(norm + column, mask=inside, other=0).to(tl.float32)
    wait(PDL)
    value = tl.load(residual + row * size + column, mask=inside, other=0)
    if ADD:
        more = tl.load(x + row * size + column, mask=inside, other=0).to(tl.float32)
        value = (value.to(tl.float32) + more).to(value.dtype)
        tl.store(residual + row * size + column, value, mask=inside)
    wide = value.to(tl.float32)
    tl.store(scaled + row * size + column, (wide * scale).to(value.dtype), mask=inside)
    tl.store(squares + row, tl.sum(wide * wide))


def scale_rows(x: Tensor | None, residual: Tensor, norm: Tensor, eps: float) -> Rows:
    """Adds x to residual [T, H] in place, if there is one, and norms that in part."""
    rows, size = residual.shape
    scaled, squares = torch.empty_like(residual), torch.empty(1, rows, dtype=torch.float32, device=residual.device)
    overlap = overlaps(residual)
    block = next_power_of_2(size)
    _scale_kernel[(rows,)](
        x, residual, norm, scaled, squares, size, ADD=x is not None, BLOCK=block, PDL=overlap, **launch(overlap)
    )
    return Rows(scaled, squares, eps)


def few_rows(
    x: Tensor | Rows,  # [T, I], at most FEW rows
    weight: Tensor,  # [O, I], or [2*O, I] with `gate`
    out: Tensor,  # [T, O]
    *,
    bias: Tensor | None = None,
    gate: bool = False,  # silu of the first half of the outputs times the second; x is `Rows`
    add: bool = False,  # to out, instead of writing it
    next_norm: Tensor | None = None,  # [O]
    eps: float = 0.0,  # of that
    cut: Cut | None = None,
) -> Rows | None:
    """out, or out +, (norm of) x @ weight.T + bias, or the gate of its halves; what is normed in part if asked."""
    squares = x.squares if isinstance(x, Rows) else None
    own_eps = x.eps if isinstance(x, Rows) else 0.0
    x = x.scaled if isinstance(x, Rows) else x
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    assert rows <= FEW and x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert out.shape == (rows, outputs) and weight.shape[1] == inputs and weight.dtype == x.dtype
    assert squares is not None or not gate
    cut = cut or cut_for(x, outputs, gate=gate)
    num_tiles = -(-outputs // cut.width)
    block = max(16, next_power_of_2(cut.width))
    overlap = overlaps(x)
    after = None
    if next_norm is not None:
        sums = torch.empty(num_tiles, rows, dtype=torch.float32, device=x.device)
        after = Rows(torch.empty_like(out), sums, eps)
    _few_rows_kernel[(num_tiles,)](
        x,
        weight,
        bias,
        squares,
        out,
        next_norm,
        None if after is None else after.scaled,
        None if after is None else after.squares,
        rows,
        outputs,
        inputs,
        cut.width,
        0 if squares is None else squares.shape[0],
        own_eps,
        NORM=squares is not None,
        GATE=gate,
        ADD=add,
        NEXT=after is not None,
        BIAS=bias is not None,
        EVEN=inputs % (cut.parts * cut.depth) == 0,
        PARTS=cut.parts,
        BLOCK_M=max(16, next_power_of_2(rows)),
        BLOCK_N=block,
        BLOCK_K=cut.depth,
        BLOCK_S=1 if squares is None else next_power_of_2(squares.shape[0]),
        EARLY=EARLY,
        PDL=overlap,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch(overlap),
    )
    return after


def linear_gpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """`linear`, in a kernel of this file for few rows and by cuBLAS for many."""
    rows, outputs = x.shape[0], weight.shape[0]
    if 0 < rows <= FEW:
        out = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device=x.device)
        multiply = in_registers if rows <= ROWS else few_rows
        multiply(x.contiguous(), weight, out, bias=bias)
        return out
    if not wide or x.dtype == torch.float32:
        return functional.linear(x, weight, bias)
    if x.is_cuda and bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
