"""Products of few rows, and what stands before and behind them in a decoder layer. See `kernels.linear`.

With few rows a product is a read of its weights, so the outputs are shared out evenly, to one program a multiprocessor
where that can be, and a program reads its weights once, all rows beside them. What is cheap is done on the way: the sum
with the residual stream, the gate, and the norm of what comes next. For that a product that adds to the residual stream
also leaves the stream times the next norm's weight, and each program's sums of squares; the product that reads those
scales its results by one over the root mean square. In the loop itself nothing is done but multiply: norming there took
three times as long. More rows than FEW are cuBLAS's.

A program asks for its first weights to be brought into the L2 cache before it waits for the kernel in front, so that
memory does not rest while kernels change.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.gpu.triton import begin, dot, jit, launch, next_power_of_2, overlaps, tl, wait

FEW = 64
"""Rows up to which these kernels are used."""

_AHEAD = 32 << 10  # bytes of weights a program asks for before it waits, at most
_CHUNK = 512  # bytes a thread asks for at once


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
    """A rule that was measured on an H100 at the shapes of Qwen3 (benchmarks/results/gpu_kernels.json)."""
    programs = _num_multiprocessors(x.device.index) if x.is_cuda else 4
    most = 32 if gate else 64
    rounds = -(-outputs // (programs * most))
    width = -(-outputs // (programs * rounds))
    if x.itemsize > 2:
        return Cut(min(width, 16), 1, 64, 4, 2)
    return Cut(width, 2, 128, 4, 4) if width > 16 else Cut(width, 4, 128, 4, 4)


@jit
def _ask(weight, first, width, outputs, inputs, BLOCK_N: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr):
    """Brings the first BYTES of each of the program's rows into the L2 cache."""
    chunks: tl.constexpr = BYTES // CHUNK
    item: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    index = tl.arange(0, BLOCK_N * chunks)
    row = tl.minimum(first + tl.minimum(index // chunks, width - 1), outputs - 1).to(tl.int64)
    address = (weight + row * inputs + (index % chunks) * (CHUNK // item)).to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, tl.full([BLOCK_N * chunks], CHUNK, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
    AHEAD: tl.constexpr,  # bytes of each output's weights to ask for before waiting
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tile = tl.program_id(0)
    first = tile * width
    up = weight + outputs.to(tl.int64) * inputs
    if AHEAD > 0:
        _ask(weight, first, width, outputs, inputs, BLOCK_N, AHEAD, CHUNK)
        if GATE:
            _ask(up, first, width, outputs, inputs, BLOCK_N, AHEAD, CHUNK)
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
    wait(PDL)
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
    result = tl.sum(total, axis=0)
    if NORM:
        root = tl.rsqrt(square / inputs + eps)[:, None]
        result *= root
    if BIAS:
        result += tl.load(bias + column, mask=own, other=0).to(tl.float32)[None, :]
    if GATE:
        result = result / (1 + tl.exp(-result)) * (tl.sum(total_up, axis=0) * root)
    valid = (row < rows)[:, None] & own[None, :]
    at = row[:, None].to(tl.int64) * outputs + column[None, :]
    if ADD:
        result += tl.load(out + at, mask=valid, other=0).to(tl.float32)
    stored = result.to(out.dtype.element_ty)
    tl.store(out + at, stored, mask=valid)
    if NEXT:
        wide = tl.where(valid, stored.to(tl.float32), 0)
        scale = tl.load(next_norm + column, mask=own, other=0).to(tl.float32)[None, :]
        tl.store(next_scaled + at, (wide * scale).to(out.dtype.element_ty), mask=valid)
        tl.store(next_squares + tile * rows + row, tl.sum(wide * wide, axis=1), mask=row < rows)


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
        AHEAD=_ahead(inputs * x.itemsize, block * (2 if gate else 1)) if overlap else 0,
        CHUNK=_CHUNK,
        PDL=overlap,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch(overlap),
    )
    return after


def _ahead(size: int, lines: int) -> int:
    """Bytes to ask for of each of a program's `lines` of weights, which have `size` bytes."""
    chunks = min(size, _AHEAD // lines) // _CHUNK
    return 0 if size % 16 or not chunks else (1 << (chunks.bit_length() - 1)) * _CHUNK


def linear_gpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """`linear`, in a kernel of this file for few rows and by cuBLAS for many."""
    rows, outputs = x.shape[0], weight.shape[0]
    if 0 < rows <= FEW:
        out = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device=x.device)
        few_rows(x.contiguous(), weight, out, bias=bias)
        return out
    if not wide or x.dtype == torch.float32:
        return functional.linear(x, weight, bias)
    if x.is_cuda and bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
