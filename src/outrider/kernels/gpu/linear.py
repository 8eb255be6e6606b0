"""Products of few rows, and what stands before and behind them in a decoder layer. See `kernels.linear`.

With few rows a product is a read of its weights, so a program takes a few outputs, reads their weights once and keeps
all rows beside them. What is cheap is done on the way: the norm of the rows, the gate, the sum with the residual stream.
More rows than FEW are cuBLAS's.

The weights are known before the kernel in front has ended: each program asks for its own to be brought into the L2
cache before it waits, so that memory does not rest while kernels change. That is most of the distance between 0.85 and
0.95 of what the memory allows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.gpu.triton import begin, dot, jit, launch, next_power_of_2, overlaps, tl, wait

FEW = 64
"""Rows up to which these kernels are used."""

_AHEAD = 64 << 10  # bytes of weights a program asks for before it waits, at most
_CHUNK = 512  # bytes a thread asks for at once


class Tiles(NamedTuple):
    """How a product is cut up: outputs and inputs of a step of a program, parts of the inputs, and Triton's knobs."""

    outputs: int
    inputs: int
    split: int
    warps: int
    stages: int


def tiles(rows: int, outputs: int, inputs: int, itemsize: int, *, gate: bool = False, may_split: bool = False) -> Tiles:
    """Enough programs to fill the device, and no more: a rule that was measured on an H100 at the shapes of Qwen3."""
    width = 64
    while width > 16 and outputs // width < 256:
        width //= 2
    if gate and width > 16:
        width //= 2
    split = 1
    while may_split and split < 4 and split * (outputs // width) < 200 and inputs // split >= 1024:
        split *= 2
    depth = 256 if itemsize <= 2 else 64
    if width * (2 if gate else 1) >= 64 or rows > 32:
        depth //= 2
    return Tiles(width, depth, split, 4, 4 if itemsize <= 2 else 2)


@jit
def _ask(weight, column, start, inputs, size, BLOCK_N: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr):
    """Brings the first BYTES of each row's part into the L2 cache."""
    chunks: tl.constexpr = BYTES // CHUNK
    item: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    index = tl.arange(0, BLOCK_N * chunks)
    row = tl.minimum(column + index // chunks, size - 1).to(tl.int64)
    offset = (index % chunks) * (CHUNK // item)
    offset = tl.where(start + offset + CHUNK // item <= inputs, start + offset, start)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [(weight + row * inputs + offset).to(tl.int64), tl.full([BLOCK_N * chunks], CHUNK, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def _few_rows_kernel(
    x,
    weight,
    bias,
    norm,
    out,
    partial,
    tickets,
    rows,
    outputs,
    inputs,
    share,  # inputs of a split
    eps,
    NORM: tl.constexpr,  # x is normed on the way
    GATE: tl.constexpr,  # silu of an output times the one `outputs` behind it
    ADD: tl.constexpr,  # out is added to, not written
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # bytes of each output's weights to ask for before waiting
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    start = split * share
    if AHEAD > 0:
        _ask(weight, tile * BLOCK_N, start, inputs, outputs, BLOCK_N, AHEAD, CHUNK)
        if GATE:
            _ask(weight + outputs.to(tl.int64) * inputs, tile * BLOCK_N, start, inputs, outputs, BLOCK_N, AHEAD, CHUNK)
    wait(PDL)
    x_at = x + row[:, None] * inputs
    w_at = weight + tl.minimum(column, outputs - 1).to(tl.int64)[:, None] * inputs
    up_at = w_at + outputs.to(tl.int64) * inputs
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(start + share, inputs)
    for k in range(start, end, BLOCK_K):
        place = k + tl.arange(0, BLOCK_K)
        inside = place < end
        value = tl.load(x_at + place[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0)
        if NORM:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            scale = tl.load(norm + place, mask=inside, other=0).to(tl.float32)
            value = (wide * scale[None, :]).to(value.dtype)
        w = tl.load(w_at + place[None, :], mask=inside[None, :], other=0)
        total = dot(value, tl.trans(w), total)
        if GATE:
            up = tl.load(up_at + place[None, :], mask=inside[None, :], other=0)
            total_up = dot(value, tl.trans(up), total_up)
    valid = (row < rows)[:, None] & (column < outputs)[None, :]
    place = row[:, None].to(tl.int64) * outputs + column[None, :]
    if SPLIT > 1:
        part = partial + split.to(tl.int64) * rows * outputs
        tl.store(part + place, total, mask=valid)
        tl.debug_barrier()
        last = tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1
        if not last:
            return
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for other in tl.static_range(SPLIT):
            at = partial + other * rows.to(tl.int64) * outputs
            total += tl.load(at + place, mask=valid, other=0, cache_modifier=".cg")
        tl.atomic_xchg(tickets + tile, 0)
    if NORM:
        root = tl.rsqrt(squares / inputs + eps)[:, None]
        total *= root
        total_up *= root
    if BIAS:
        total += tl.load(bias + column, mask=column < outputs, other=0).to(tl.float32)[None, :]
    if GATE:
        total = total / (1 + tl.exp(-total)) * total_up
    if ADD:
        total += tl.load(out + place, mask=valid, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=valid)


def few_rows(
    x: Tensor,  # [T, I], at most FEW rows
    weight: Tensor,  # [O, I], or [2*O, I] with `gate`
    out: Tensor,  # [T, O]
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,  # [I]
    eps: float = 0.0,
    gate: bool = False,
    add: bool = False,
    tickets: Tensor | None = None,  # int32, all 0, one a tile at least; without them the inputs are not split
    cut: Tiles | None = None,
) -> Tensor:
    """out, or out +, (norm of) x @ weight.T + bias, or the gate of its halves. Returns out."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    assert rows <= FEW and x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert out.shape == (rows, outputs) and weight.shape[1] == inputs and weight.dtype == x.dtype
    if cut is None:
        may_split = tickets is not None and norm is None and not gate
        cut = tiles(rows, outputs, inputs, x.itemsize, gate=gate, may_split=may_split)
    share = -(-inputs // (cut.split * cut.inputs)) * cut.inputs
    partial = torch.empty(cut.split, rows, outputs, dtype=torch.float32, device=x.device) if cut.split > 1 else None
    overlap = overlaps(x)
    ahead = 0
    if overlap and inputs * x.itemsize % 16 == 0 and share * x.itemsize >= _CHUNK:
        most = _AHEAD // cut.outputs // (2 if gate else 1)
        ahead = min(share * x.itemsize, most) // _CHUNK * _CHUNK
        ahead = 1 << (ahead.bit_length() - 1) if ahead else 0
    num_tiles = -(-outputs // cut.outputs)
    assert tickets is None or len(tickets) >= num_tiles
    _few_rows_kernel[(num_tiles, cut.split)](
        x,
        weight,
        bias,
        norm,
        out,
        partial,
        tickets,
        rows,
        outputs,
        inputs,
        share,
        eps,
        NORM=norm is not None,
        GATE=gate,
        ADD=add,
        BIAS=bias is not None,
        SPLIT=cut.split,
        BLOCK_M=max(16, next_power_of_2(rows)),
        BLOCK_N=cut.outputs,
        BLOCK_K=cut.inputs,
        AHEAD=ahead,
        CHUNK=_CHUNK,
        PDL=overlap,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **launch(overlap),
    )
    return out


def linear_gpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """`linear`, in a kernel of this file for few rows and by cuBLAS for many."""
    rows, outputs = x.shape[0], weight.shape[0]
    if 0 < rows <= FEW:
        out = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device=x.device)
        return few_rows(x.contiguous(), weight, out, bias=bias)
    if not wide or x.dtype == torch.float32:
        return functional.linear(x, weight, bias)
    if x.is_cuda and bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
