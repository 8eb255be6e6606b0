"""Truncation by searching each row's threshold digit by digit, with several programs a row. See `kernels.truncate`.

The bits of a float, ordered, are an unsigned key of 32 bits. The k-th largest logit is the largest key that k logits
reach: four kernels find it, 8 bits each, from histograms of the digit. The last logit that top-p keeps is the largest
key such that the logits that reach it have mass top_p: eight kernels find it, 4 bits each, from the mass that reaches
each of 16 keys. What is counted is left block by block of a row's logits, and every program of the next kernel adds
that up in the same order: nothing is atomic, and nothing depends on how many programs share a row. A last kernel cuts.
Programs of rows with nothing to cut leave each kernel as soon as they know.

Masses are sums in float64, in an order of their own: where the mass of some tokens equals top_p to rounding, a few
parts in 10**16 of it, this and the reference may differ by a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait

_BLOCK = 4096
_COUNT_TURNS, _MASS_TURNS = 4, 8
_PROGRAMS = 528  # about as many as a GPU has room for: many rows with nothing to cut are soon passed over


@jit
def _key(value):
    """uint32 that rise as float32 do; both zeros have one."""
    number = (value + 0.0).to(tl.uint32, bitcast=True)
    return number ^ (((number >> 31) * 0x7FFFFFFF) | 0x80000000)


@jit
def _value(key):
    """The float32 a key was made of."""
    number = key ^ (((1 - (key >> 31)) * 0x7FFFFFFF) | 0x80000000)
    return number.to(tl.float32, bitcast=True)


@jit
def _asked(top_k, top_p, min_p, temperature, slot, row, size, BY_SLOT: tl.constexpr):
    """What a row's request asks for: top-k, 0 if it is off, top-p and min-p."""
    owner = row
    if BY_SLOT:
        owner = tl.load(slot + row)
    k, p, min_prob = tl.load(top_k + owner), tl.load(top_p + owner), tl.load(min_p + owner)
    k = tl.where(k < size, tl.maximum(k, 0), 0)
    if BY_SLOT:
        drawn = tl.load(temperature + owner) != 0
        k, p, min_prob = tl.where(drawn, k, 0), tl.where(drawn, p, 1.0), tl.where(drawn, min_prob, 0.0)
    return k, p, min_prob


@jit
def _next_by_count(counts, row, num_blocks, prefix, wanted, BLOCKS: tl.constexpr):
    """The prefix with one more digit, and how many logits are wanted of those that have it."""
    block, digit = tl.arange(0, BLOCKS), tl.arange(0, 256)
    index = (row * num_blocks + block[:, None]) * 256 + digit[None, :]
    count = tl.sum(tl.load(counts + index, mask=block[:, None] < num_blocks, other=0), 0)
    reach = tl.cumsum(count, 0, reverse=True)
    found = tl.maximum(tl.sum((reach >= wanted).to(tl.int32)) - 1, 0)
    return (prefix << 8) | found.to(tl.uint32), wanted - tl.sum(tl.where(digit > found, count, 0))


@jit
def _mass_by_key(masses, row, num_blocks, BLOCKS: tl.constexpr):
    """[16] float64, the row's mass at or above each key."""
    block, digit = tl.arange(0, BLOCKS), tl.arange(0, 16)
    index = (row * 16 + digit[:, None]) * num_blocks + block[None, :]
    return tl.sum(tl.load(masses + index, mask=block[None, :] < num_blocks, other=0.0), 1)


@jit
def _next_by_mass(mass, prefix, wanted):
    """The prefix with one more digit."""
    found = tl.maximum(tl.sum((mass >= wanted).to(tl.int32)) - 1, 0)
    return (prefix << 4) | found.to(tl.uint32)


@jit
def _largest(block_max, row, num_blocks, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    return tl.max(tl.load(block_max + row * num_blocks + block, mask=block < num_blocks, other=-float("inf")))


@jit
def _count_kernel(
    logits,
    top_k,
    top_p,
    min_p,
    temperature,
    slot,
    block_max,  # [L, blocks] float32, written in the first turn
    before,  # [L, blocks, 256] int32, the last turn's counts
    counts,  # [L, blocks, 256] int32
    known,  # [L, 2] int64, the last turn's prefix and how many were wanted of it
    learned,  # [L, 2] int64, this turn's
    stride,
    size,
    num_blocks,
    shift,  # of this turn's digit
    FIRST: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row, first, step = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    wait(PDL)
    k, p, min_prob = _asked(top_k, top_p, min_p, temperature, slot, row, size, BY_SLOT)
    if ((k > 0) | (p < 1) | (min_prob > 0)) & FIRST:
        for block in range(first, num_blocks, step):
            column = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(logits + row * stride + column, mask=column < size, other=-float("inf"))
            tl.store(block_max + row * num_blocks + block, tl.max(value))
    if k > 0:
        wanted = k
        prefix = tl.full((), 0, tl.uint32)
        if not FIRST:
            prefix = tl.load(known + row * 2).to(tl.uint32)
            wanted = tl.load(known + row * 2 + 1).to(tl.int32)
            prefix, wanted = _next_by_count(before, row, num_blocks, prefix, wanted, BLOCKS)
        if first == 0:
            tl.store(learned + row * 2, prefix.to(tl.int64))
            tl.store(learned + row * 2 + 1, wanted.to(tl.int64))
        for block in range(first, num_blocks, step):
            column = block * BLOCK + tl.arange(0, BLOCK)
            key = _key(tl.load(logits + row * stride + column, mask=column < size, other=0)) >> shift
            meant = (column < size) & ((key >> 8) == prefix)
            index = (row * num_blocks + block) * 256 + tl.arange(0, 256)
            tl.store(counts + index, tl.histogram((key & 255).to(tl.int32), 256, mask=meant))


@jit
def _mass_kernel(
    logits,
    top_k,
    top_p,
    min_p,
    temperature,
    slot,
    block_max,
    counts,  # of the last of the turns above
    counted,  # [L, 2] int64, likewise
    before,  # [L, 16, blocks] float64, the last turn's masses
    masses,  # [L, 16, blocks] float64
    known,  # [L] int64, the last turn's prefix
    learned,  # [L] int64, this turn's
    bounds,  # [L, 2] float64: what no kept logit is below by min-p and top-k; the mass wanted by top-p
    stride,
    size,
    num_blocks,
    shift,  # of this turn's digit
    TURN: tl.constexpr,  # 2 stands for all later ones too
    BY_SLOT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row, first, step = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    wait(PDL)
    k, p, min_prob = _asked(top_k, top_p, min_p, temperature, slot, row, size, BY_SLOT)
    floor = tl.full((), -float("inf"), tl.float64)
    largest = floor
    if (p < 1) | ((TURN == 0) & ((k > 0) | (min_prob > 0))):
        largest = _largest(block_max, row, num_blocks, BLOCKS).to(tl.float64)
        if TURN == 0:
            if min_prob > 0:
                floor = tl.log(min_prob.to(tl.float64)) + largest
            if k > 0:
                prefix = tl.load(counted + row * 2).to(tl.uint32)
                wanted = tl.load(counted + row * 2 + 1).to(tl.int32)
                kth, _ = _next_by_count(counts, row, num_blocks, prefix, wanted, BLOCKS)
                floor = tl.maximum(floor, _value(kth).to(tl.float64))
            if first == 0:
                tl.store(bounds + row * 2, floor)
        else:
            floor = tl.load(bounds + row * 2)
    if p < 1:
        prefix = tl.full((), 0, tl.uint32)
        if TURN > 0:
            mass = _mass_by_key(before, row, num_blocks, BLOCKS)
            if TURN == 1:
                needed = p.to(tl.float64) * tl.max(mass)
                if first == 0:
                    tl.store(bounds + row * 2 + 1, needed)
            else:
                prefix = tl.load(known + row).to(tl.uint32)
                needed = tl.load(bounds + row * 2 + 1)
            prefix = _next_by_mass(mass, prefix, needed)
            if first == 0:
                tl.store(learned + row, prefix.to(tl.int64))
        min_key = (prefix << 4) << shift
        for block in range(first, num_blocks, step):
            column = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(logits + row * stride + column, mask=column < size, other=-float("inf"))
            key = _key(value)
            address = masses + row * 16 * num_blocks + block
            if (tl.max(value).to(tl.float64) >= floor) & (tl.max(key) >= min_key):
                value64 = value.to(tl.float64)
                weight = tl.where(value64 >= floor, tl.exp(value64 - largest), 0.0)
                for digit in tl.static_range(16):
                    reached = key >= (((prefix << 4) | digit) << shift)
                    tl.store(address + digit * num_blocks, tl.sum(tl.where(reached, weight, 0.0)))
            else:
                for digit in tl.static_range(16):
                    tl.store(address + digit * num_blocks, tl.full((), 0.0, tl.float64))


@jit
def _cut_kernel(
    logits,
    top_k,
    top_p,
    min_p,
    temperature,
    slot,
    block_max,
    before,
    known,
    bounds,
    stride,
    size,
    num_blocks,
    BY_SLOT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row, first, step = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    wait(PDL)
    k, p, min_prob = _asked(top_k, top_p, min_p, temperature, slot, row, size, BY_SLOT)
    if (k > 0) | (p < 1) | (min_prob > 0):
        floor = tl.load(bounds + row * 2)
        if p < 1:
            mass = _mass_by_key(before, row, num_blocks, BLOCKS)
            prefix = tl.load(known + row).to(tl.uint32)
            last = _value(_next_by_mass(mass, prefix, tl.load(bounds + row * 2 + 1)))
            last = tl.minimum(last, _largest(block_max, row, num_blocks, BLOCKS))  # at least one is kept
            floor = tl.maximum(floor, last.to(tl.float64))
        for block in range(first, num_blocks, step):
            column = block * BLOCK + tl.arange(0, BLOCK)
            address = logits + row * stride + column
            value = tl.load(address, mask=column < size, other=0)
            tl.store(address, -float("inf"), mask=(column < size) & (value.to(tl.float64) < floor))


def truncate_gpu(
    logits: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    temperature: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """`truncate_reference` in thirteen kernels, of which the last alone writes to the logits."""
    assert logits.dtype == top_p.dtype == min_p.dtype == torch.float32 and top_k.dtype == torch.int32
    assert logits.stride(1) == 1 and top_k.is_contiguous() and top_p.is_contiguous() and min_p.is_contiguous()
    assert (slot is None) == (temperature is None)
    assert slot is None or (slot.dtype == torch.int64 and slot.is_contiguous())
    assert temperature is None or (temperature.dtype == torch.float32 and temperature.is_contiguous())
    rows, size = logits.shape
    if not rows:
        return logits
    blocks, overlap = -(-size // _BLOCK), overlaps(logits)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    block_max, bounds = new(rows, blocks, dtype=torch.float32), new(rows, 2, dtype=torch.float64)
    counts, masses = new(2, rows, blocks, 256, dtype=torch.int32), new(2, rows, 16, blocks, dtype=torch.float64)
    counted, prefix = new(2, rows, 2, dtype=torch.int64), new(2, rows, dtype=torch.int64)
    asked = (top_k, top_p, min_p, temperature, slot, block_max)
    fixed = {
        "BY_SLOT": slot is not None,
        "BLOCKS": next_power_of_2(blocks),
        "BLOCK": _BLOCK,
        "PDL": overlap,
        "num_warps": 16,
        **launch(overlap),
    }
    shape, grid = (logits.stride(0), size, blocks), (rows, min(blocks, -(-_PROGRAMS // rows)))
    for turn in range(_COUNT_TURNS):
        old, now = 1 - turn % 2, turn % 2
        found = (counts[old], counts[now], counted[old], counted[now])
        _count_kernel[grid](logits, *asked, *found, *shape, 24 - 8 * turn, FIRST=turn == 0, **fixed)
    last = (_COUNT_TURNS - 1) % 2
    asked_last = (*asked, counts[last], counted[last])
    for turn in range(_MASS_TURNS):
        old, now = 1 - turn % 2, turn % 2
        found = (masses[old], masses[now], prefix[old], prefix[now])
        _mass_kernel[grid](logits, *asked_last, *found, bounds, *shape, 28 - 4 * turn, TURN=min(turn, 2), **fixed)
    last = (_MASS_TURNS - 1) % 2
    _cut_kernel[grid](logits, *asked, masses[last], prefix[last], bounds, *shape, **fixed)
    return logits
