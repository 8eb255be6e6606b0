"""Drawing tokens: several programs a row find the best of their columns, then one takes the best of those.

A score and its column are compared as one integer, so there is one best whatever the order, and the first column wins
a tie. Of a row that is not greedy only a bound of each score is computed, in float32; exact scores, in float64, are
those of the few columns whose bound is above the best exact score so far. See `kernels.sample`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.noise import bits, row_key
from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait
from outrider.kernels.sample import NO_TOKEN

_BLOCK = 2048


@jit
def _ranked(score, column):
    """int64 that rise with the score, and among equal scores as the column falls. NaN is above all numbers."""
    number = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    rising = tl.where(score == score, number ^ ((number >> 31) & 0x7FFFFFFF), 0x7FC00000)
    return (rising.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@jit
def _column(ranked):
    """The column a number of `_ranked` was made of."""
    return (0x7FFFFFFF - (ranked & 0x7FFFFFFF)).to(tl.int32)


@jit
def _is_finite(ranked):
    """Whether the score that a number of `_ranked` was made of is one: below +inf and NaN, and above -inf."""
    return (ranked < (0x7F800000 << 32)) & (ranked >= (-0x7F800000 << 32))


@jit
def _gumbel(number):
    """`kernels.noise.gumbel` of uint32: in float64, then rounded. 1 - u has 33 bits, so its log is that of log1p."""
    uniform = (number.to(tl.float64) + 0.5) * (2.0**-32)
    return (-tl.log(-tl.log(1.0 - uniform))).to(tl.float32)


@jit
def _gumbel_bound(number):
    """No less than `_gumbel`: -log1p(-u) > u + u * u / 2. Errors, of log2 and of rounding, are below 6e-6."""
    uniform = (number.to(tl.float32) + 0.5) * (2.0**-32)
    return tl.log2(uniform + 0.5 * uniform * uniform) * -0.6931471805599453 + 1e-5


@jit
def _best_of_block_kernel(
    logits,
    temperature,
    seed,
    slot,
    position,
    ids,
    best,  # [L, blocks] int64
    stride,
    size,
    PURPOSE: tl.constexpr,
    NOISY: tl.constexpr,
    BY_SLOT: tl.constexpr,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    nothing = tl.full((), -(2**63), tl.int64)
    wait(PDL)
    logits += row * stride
    score = tl.load(logits + column, mask=inside, other=0)
    found = nothing
    if NOISY:
        owner = tl.load(slot + row) if BY_SLOT else row
        if tl.load(temperature + owner) == 0:
            found = tl.max(tl.where(inside, _ranked(score, column), nothing))
        else:
            a, b = row_key(tl.load(seed + owner), tl.load(position + row), PURPOSE)
            token = tl.load(ids + column, mask=inside, other=0) if MAPPED else column
            bound = _ranked(score + _gumbel_bound(bits(a, b, token)), column)
            bound = tl.where(inside, bound, nothing)
            bound_max = tl.max(bound)
            while bound_max > found:
                candidate = _column(bound_max)
                likely = tl.load(ids + candidate) if MAPPED else candidate
                exact = tl.load(logits + candidate) + _gumbel(bits(a, b, likely))
                found = tl.maximum(found, _ranked(exact, candidate))
                bound = tl.where(column == candidate, nothing, bound)
                bound_max = tl.max(bound)
    else:
        found = tl.max(tl.where(inside, _ranked(score, column), nothing))
    tl.store(best + row * tl.num_programs(1) + block, found)


@jit
def _best_of_row_kernel(
    best, ids, out, num_blocks,
    MAPPED: tl.constexpr, NO_TOKEN: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    wait(PDL)
    found = tl.load(best + row * num_blocks + block, mask=block < num_blocks, other=-(2**63))
    best_of_row = tl.max(found)
    column = _column(best_of_row).to(tl.int64)
    token = tl.load(ids + column) if MAPPED else column
    tl.store(out + row, tl.where(_is_finite(best_of_row), token, NO_TOKEN))


def gumbel_argmax_gpu(
    logits: Tensor,
    temperature: Tensor | None,
    seed: Tensor,
    position: Tensor,
    purpose: int,
    ids: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """`gumbel_argmax_reference` in two kernels."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    assert logits.dtype == torch.float32 and seed.dtype == position.dtype == torch.int64
    assert temperature is None or (temperature.dtype == torch.float32 and temperature.is_contiguous())
    assert seed.is_contiguous() and position.is_contiguous()
    assert ids is None or (ids.is_contiguous() and ids.dtype == torch.int64)
    assert slot is None or (slot.is_contiguous() and slot.dtype == torch.int64)
    rows, size = logits.shape
    blocks, overlap = -(-size // _BLOCK), overlaps(logits)
    best = torch.empty((rows, blocks), dtype=torch.int64, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _best_of_block_kernel[(rows, blocks)](
        logits,
        temperature,
        seed,
        slot,
        position,
        ids,
        best,
        logits.stride(0),
        size,
        PURPOSE=int(purpose),
        NOISY=temperature is not None,
        BY_SLOT=slot is not None,
        MAPPED=ids is not None,
        BLOCK=_BLOCK,
        PDL=overlap,
        **launch(overlap),
    )
    _best_of_row_kernel[(rows,)](
        best,
        ids,
        out,
        blocks,
        MAPPED=ids is not None,
        NO_TOKEN=NO_TOKEN,
        BLOCKS=next_power_of_2(blocks),
        PDL=overlap,
        num_warps=1,
        **launch(overlap),
    )
    return out
