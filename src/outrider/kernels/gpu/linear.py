"""Products of few rows, and what stands before and behind them in a decoder layer. See `kernels.linear`.

With few rows a product is a read of its weights, so a program takes a few outputs, reads their weights once and keeps
all rows beside them. To tensor cores the weights are the first operand, whose height is 16 or more, and the rows the
second, whose width may be 8: so a result stands on its side until it is stored. Where outputs are too few for a device,
several programs share their inputs; who is done last adds up what all of them left, in their order.

What is cheap is done on the way: the sum with the residual stream, the gate, and the norm of what comes next. For that
a product that adds to the residual stream also leaves the stream times the next norm's weight, and each program's sums
of squares; the product that reads those divides its results by the root mean square. More rows than FEW are cuBLAS's.

Weights are constants, so a program need not wait for the kernel in front to end before it reads them. It loads the
first of its weights into registers, and only then waits: memory does not rest while kernels change, and the rows, once
they are there, meet weights that are there already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.gpu.partial_norm import Rows, shrink
from outrider.kernels.gpu.triton import (
    begin,
    dot,
    is_roomy,
    jit,
    jit_counts,
    launch,
    next_power_of_2,
    overlaps,
    round_to,
    tl,
    wait,
)

FEW = 32
"""Rows up to which these kernels are used, in products but a vocabulary's: cuBLAS is faster above."""

TICKETS = 128
"""Counters that a product may need whose programs share inputs: one a tile."""

_LARGE = 16 << 20  # bytes of weights from which on a gate's tiles are wide: enough of them for every multiprocessor
_VOCABULARY = 16_384  # outputs from which on a product is taken for a vocabulary's
_FEW_OF_VOCABULARY = 8  # rows, as FEW
_ONE_EACH, _TWO_EACH = 128, 256  # programs of which a multiprocessor gets one, or two


class Tiles(NamedTuple):
    """How a product is cut up.

    A program makes `outputs` columns, `inputs` numbers of their weights at a time, both powers of two. Each of `slices`
    groups of warps takes its own part of those inputs, summed at the end. Where there are 0, one row is multiplied
    without tensor cores. `parts` programs share a tile's inputs, each a whole number of steps.
    """

    outputs: int
    inputs: int
    slices: int = 1
    warps: int = 4
    stages: int = 3
    parts: int = 1


def tiles(rows: int, outputs: int, inputs: int, itemsize: int, *, gate: bool = False, roomy: bool = False) -> Tiles:
    """What was fastest on an H200 at the shapes of Qwen3-0.6B to 8B (docs/journal); `gate`: it has one.

    Programs come as places become free. Where a multiprocessor has more places than it should get programs, they crowd
    onto the first ones, and memory waits for those: so shared memory is made to leave as many places as there are
    programs. Not `roomy`, it is at most 99 KiB, all that a GPU of capability 8.6 has.
    """
    halves = 2 if gate else 1
    depth = max(64, next_power_of_2(inputs))
    large = halves * outputs * inputs * itemsize >= _LARGE
    vocabulary = outputs >= _VOCABULARY and not gate
    if itemsize > 2:
        return Tiles(16 // halves, 64, stages=2)
    if rows == 1 and vocabulary:
        step = min(depth, 2048)
        return Tiles(4, step, 0, 4 if step > 1024 else 2, 2)
    if rows == 1:
        step = min(max(64, depth // 2) if outputs > inputs else depth, 2048 if inputs % 2048 == 0 else 1024)
        if step > 1024:
            return Tiles(4 // halves, step, 0, 4, 2)
        return Tiles(4 // halves, step, 0, 4 if depth > 2048 else 2, 3)
    if rows <= 8:
        if vocabulary:
            return Tiles(64, min(depth, 128), 1, 4, 5)
        if gate and large:
            return Tiles(32, min(depth, 256), 1, 4, 3)
        if gate:
            return Tiles(16, min(depth, 1024), 4, 4, 2)
        programs = -(-outputs // 16)
        if outputs > inputs and (programs > _TWO_EACH or inputs <= 1024):
            return Tiles(16, min(depth, 512), 4, 4, 4)
        alone = programs <= _ONE_EACH // 2 or (programs <= _ONE_EACH and inputs > 2048)
        return Tiles(16, min(depth, 1024), 4, 4, 4 if roomy and alone else 3)
    if gate:
        return Tiles(32, min(depth, 128), 1, 4, 4) if rows <= 16 else Tiles(64, 64, 1, 4, 4)
    step, stages = (min(depth, 256), 3) if rows <= 16 else (min(depth, 128), 4)
    return Tiles(64, step, 1, 4, stages, _parts(-(-outputs // 64), inputs, step))


def _parts(tiles: int, inputs: int, step: int) -> int:
    """Among how many programs a tile's inputs are shared out: where tiles are few, and more where inputs are many."""
    parts = 1
    while parts < 4 and (tiles * parts < 64 or (tiles * parts < 96 and inputs >= 4096 * parts)):
        parts *= 2
    while inputs % (parts * step) and parts > 1:
        parts //= 2
    return parts


@jit
def _line(tile, index, outputs, GATE: tl.constexpr, WIDTH: tl.constexpr):
    """The weight rows of a tile: with a gate, an output's and then the one's it is multiplied with."""
    if GATE:
        line = tl.minimum(tile * WIDTH + index // 2, outputs - 1) + index % 2 * outputs
    else:
        line = tl.minimum(tile * WIDTH + index, outputs - 1)
    return line


@jit
def _along(size: tl.constexpr, SLICES: tl.constexpr, AXIS: tl.constexpr):
    """0, 1, ... along the rows (axis 0) or the inputs (axis 1) of a tile, which slices cut along its inputs."""
    if SLICES == 1:
        index = tl.expand_dims(tl.arange(0, size), 1 - AXIS)
    elif AXIS == 0:
        index = tl.arange(0, size)[None, :, None]
    else:
        part: tl.constexpr = size // SLICES
        index = tl.arange(0, SLICES)[:, None, None] * part + tl.arange(0, part)[None, None, :]
    return index


@jit
def _load(at, inside, valid, EVEN: tl.constexpr, FULL: tl.constexpr):
    """A tile, zeros for what is not there: `inside` of the inputs, `valid` of the rows. EVEN, FULL: all there."""
    if EVEN and FULL:
        tile = tl.load(at)
    elif EVEN:
        tile = tl.load(at, mask=valid, other=0)
    elif FULL:
        tile = tl.load(at, mask=inside, other=0)
    else:
        tile = tl.load(at, mask=valid & inside, other=0)
    return tile


@jit
def _multiply(w, value, total, SLICES: tl.constexpr, BLOCK_M: tl.constexpr):
    """total + w @ value.T, slice by slice; of one row the products alone, to be summed when all are there."""
    if BLOCK_M == 1:
        total = total + w.to(tl.float32) * value.to(tl.float32)
    elif SLICES == 1:
        total = dot(w, tl.trans(value), total)
    else:
        total = dot(w, tl.permute(value, (0, 2, 1)), total)
    return total


@jit
def _nothing(w, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What `_multiply` adds to at first."""
    if BLOCK_M == 1:
        total = tl.zeros(w.shape, tl.float32)
    elif SLICES == 1:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    return total


@jit
def _sum(total, SLICES: tl.constexpr, BLOCK_M: tl.constexpr):
    """[BLOCK_N, BLOCK_M] of what lies in slices, or was not summed yet."""
    if BLOCK_M == 1:
        total = tl.sum(total, axis=1)[:, None]
    elif SLICES > 1:
        total = tl.sum(total, axis=0)
    return total


@jit_counts("rows", "num_sums")
def _few_rows_kernel(
    x,
    weight,
    bias,
    squares,
    out,
    next_norm,
    next_scaled,
    next_squares,
    partial,  # with PARTS [tiles, PARTS, BLOCK_N, BLOCK_M] float32
    tickets,  # with PARTS, taken for each tile; 0 before and after
    rows,
    outputs,
    inputs,
    part_size,  # inputs of a part
    num_sums,
    eps,
    NORM: tl.constexpr,  # divide by the root mean square of the rows, whose squares are given
    GATE: tl.constexpr,  # silu of an output times the one `outputs` behind it
    ADD: tl.constexpr,  # out is added to, not written
    NEXT: tl.constexpr,  # leave out times next_norm, and its sums of squares
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # all steps are whole
    SHRINK: tl.constexpr,
    WIDTH: tl.constexpr,  # columns
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # weight rows: two a column with a gate
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    LATE: tl.constexpr,  # see `few_rows`
    PDL: tl.constexpr,
):
    if not LATE:
        begin(PDL)
    tile, part = tl.program_id(0), tl.program_id(1)
    input_index = _along(BLOCK_K, SLICES, 1)
    if PARTS > 1:
        input_index += tl.multiple_of(part * part_size, BLOCK_K)
    w_at = weight + _line(tile, _along(BLOCK_N, SLICES, 0), outputs, GATE, WIDTH).to(tl.int64) * inputs + input_index
    w = _load(w_at, input_index < inputs, True, EVEN, True)
    column = tile * WIDTH + tl.arange(0, WIDTH)
    own = column < outputs
    if NEXT:
        scale = tl.load(next_norm + column, mask=own, other=0).to(tl.float32)[:, None]
    if BIAS:
        offset = tl.load(bias + _line(tile, tl.arange(0, BLOCK_N), outputs, GATE, WIDTH)).to(tl.float32)[:, None]
    wait(PDL)
    if LATE:
        begin(PDL)
    row = _along(BLOCK_M, SLICES, 0)
    x_at = x + row * inputs + input_index
    value = _load(x_at, input_index < inputs, row < rows, EVEN, BLOCK_M == 1)
    flat_row = tl.arange(0, BLOCK_M)
    valid = own[:, None] & (flat_row < rows)[None, :]
    at = column[:, None] + flat_row[None, :].to(tl.int64) * outputs
    if NORM:
        sums = tl.arange(0, BLOCK_S)
        known = (sums < num_sums)[:, None] & (flat_row < rows)[None, :]
        square = tl.load(squares + sums[:, None] * rows + flat_row[None, :], mask=known, other=0)
    if ADD and PARTS == 1:
        old = tl.load(out + at, mask=valid, other=0)
    total = _multiply(w, value, _nothing(w, SLICES, BLOCK_M, BLOCK_N), SLICES, BLOCK_M)
    for k in tl.range(BLOCK_K, part_size, BLOCK_K, num_stages=STAGES):
        value = _load(x_at + k, input_index + k < inputs, row < rows, EVEN, BLOCK_M == 1)
        w = _load(w_at + k, input_index + k < inputs, True, EVEN, True)
        total = _multiply(w, value, total, SLICES, BLOCK_M)
    result = _sum(total, SLICES, BLOCK_M)
    if PARTS > 1:
        size: tl.constexpr = BLOCK_N * BLOCK_M
        left = partial + tile.to(tl.int64) * PARTS * size + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + flat_row[None, :]
        tl.store(left + part * size, result)
        tl.debug_barrier()  # all threads have stored before one takes the ticket
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel") < PARTS - 1:
            return
        result = tl.load(left, cache_modifier=".cg")  # others wrote it: not through this multiprocessor's cache
        for other in tl.static_range(1, PARTS):
            result += tl.load(left + other * size, cache_modifier=".cg")
        tl.store(tickets + tile, 0)
        if ADD:
            old = tl.load(out + at, mask=valid, other=0)
    if NORM:
        result *= (tl.rsqrt(tl.sum(square, axis=0) / inputs + eps) / SHRINK)[None, :]
    if BIAS:
        result += offset
    if GATE:
        gate, up = tl.split(tl.permute(tl.reshape(result, [WIDTH, 2, BLOCK_M]), (0, 2, 1)))
        result = gate / (1 + tl.exp(-gate)) * up
    if ADD:
        result += old.to(tl.float32)
    stored = round_to(result, out.dtype.element_ty)
    tl.store(out + at, stored, mask=valid)
    if NEXT:
        upcast = tl.where(valid, stored.to(tl.float32), 0)
        tl.store(next_scaled + at, round_to(upcast * scale * SHRINK, out.dtype.element_ty), mask=valid)
        tl.store(next_squares + tile * rows + flat_row, tl.sum(upcast * upcast, axis=0), mask=flat_row < rows)


def few_rows(
    x: Tensor | Rows,  # [T, I], at most FEW rows
    weight: Tensor,  # [O, I], or [2*O, I] with `gate`
    out: Tensor,  # [T, O]
    *,
    bias: Tensor | None = None,
    gate: bool = False,  # silu of the first half of the outputs times the second
    add: bool = False,  # to out, instead of writing it
    next_norm: Tensor | None = None,  # [O]
    eps: float = 0.0,  # of that
    cut: Tiles | None = None,  # None: what `tiles` says
    tickets: Tensor | None = None,  # [TICKETS] int32, all 0 before and after; without, a tile's inputs are not shared
    late: bool = False,
    overlap: bool | None = None,  # None: wherever the device can
) -> Rows | None:
    """out, or out +, (norm of) x @ weight.T + bias, or the gate of its halves; what is normed in part if asked.

    `late`: programs of the next kernel come only when all of this one's have waited. So before it waits in turn, the
    next kernel may read all that was written before this one.
    """
    given, x = x, x.scaled if isinstance(x, Rows) else x
    squares, own_eps = (given.squares, given.eps) if isinstance(given, Rows) else (None, 0.0)
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    assert 0 < rows <= FEW and x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert out.shape == (rows, outputs) and weight.shape[1] == inputs and weight.dtype == x.dtype
    cut = cut or tiles(rows, outputs, inputs, x.itemsize, gate=gate, roomy=is_roomy(x.device))
    assert cut.slices or rows == 1
    overlap = overlaps(x) if overlap is None else overlap
    if tickets is None:
        cut = cut._replace(parts=1)
    num_tiles = -(-outputs // cut.outputs)
    assert inputs % (cut.parts * cut.inputs) == 0 or cut.parts == 1
    assert tickets is None or num_tiles <= len(tickets) or cut.parts == 1
    block_m = max(8, next_power_of_2(rows)) if cut.slices else 1
    after = None
    if next_norm is not None:
        sums = torch.empty(num_tiles, rows, dtype=torch.float32, device=x.device)
        after = Rows(torch.empty_like(out), sums, eps)
    partial = None
    if cut.parts > 1:
        size = num_tiles * cut.parts * cut.outputs * (2 if gate else 1) * block_m
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    _few_rows_kernel[(num_tiles, cut.parts)](
        x,
        weight,
        bias,
        squares,
        out,
        next_norm,
        None if after is None else after.scaled,
        None if after is None else after.squares,
        partial,
        tickets if cut.parts > 1 else None,
        rows,
        outputs,
        inputs,
        inputs // cut.parts,
        0 if squares is None else squares.shape[0],
        own_eps,
        NORM=squares is not None,
        GATE=gate,
        ADD=add,
        NEXT=after is not None,
        BIAS=bias is not None,
        EVEN=inputs % cut.inputs == 0,
        SHRINK=shrink(x.dtype),
        WIDTH=cut.outputs,
        SLICES=max(cut.slices, 1),
        PARTS=cut.parts,
        BLOCK_M=block_m,
        BLOCK_N=cut.outputs * (2 if gate else 1),
        BLOCK_K=cut.inputs,
        BLOCK_S=1 if squares is None else next_power_of_2(squares.shape[0]),
        STAGES=cut.stages,
        LATE=late,
        PDL=overlap,
        num_warps=cut.warps,
        **launch(overlap),
    )
    return after


def linear_gpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
    """`linear`, in a kernel of this file for few rows and by cuBLAS for many."""
    rows, outputs = x.shape[0], weight.shape[0]
    if 0 < rows <= (_FEW_OF_VOCABULARY if outputs >= _VOCABULARY else FEW):
        out = torch.empty(rows, outputs, dtype=torch.float32 if upcast else x.dtype, device=x.device)
        cut = tiles(rows, outputs, x.shape[1], x.itemsize, roomy=is_roomy(x.device))
        tickets = torch.zeros(TICKETS, dtype=torch.int32, device=x.device) if cut.parts > 1 else None
        few_rows(x.contiguous(), weight, out, bias=bias, cut=cut, tickets=tickets)
        return out
    if not rows:
        return torch.empty(0, outputs, dtype=torch.float32 if upcast else x.dtype, device=x.device)
    if not upcast or x.dtype == torch.float32:
        return functional.linear(x, weight, bias)
    if x.is_cuda and bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
