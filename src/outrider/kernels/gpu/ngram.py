"""Prompt lookup: a program a row walks its history backwards and stops at a copy of the greatest length.
See `kernels.ngram`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait

_BLOCK = 2048


@jit
def _ngram_kernel(
    tokens,
    length,
    slot,
    logits_start,
    drafts,
    number,
    max_len,
    num_drafts,
    shortest,
    longest,
    DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DRAFTS)
    wait(PDL)
    owner = tl.load(slot + row)
    history = tokens + owner * max_len
    end = tl.load(length + owner)
    samples = tl.load(logits_start + row + 1) > tl.load(logits_start + row)
    best = tl.full((), 0, tl.int32)
    copy = tl.full((), 0, tl.int32)  # a copy ends before it
    stop = tl.where(samples, end, 0)
    while stop > 0 and best < longest:
        copy_end = stop - 1 - tl.arange(0, BLOCK)
        run = tl.zeros((BLOCK,), tl.int32)
        unbroken = copy_end < end
        for i in range(longest):
            unbroken = unbroken & (copy_end > i)
            last = tl.load(history + end - 1 - i, mask=end > i, other=0)
            unbroken = unbroken & (tl.load(history + copy_end - 1 - i, mask=unbroken, other=0) == last)
            run += unbroken.to(tl.int32)
        block_best = tl.max(run)
        if (block_best > best) & (block_best >= shortest):
            best = block_best
            copy = tl.max(tl.where(run == block_best, copy_end, 0))
        stop -= BLOCK
    period = tl.maximum(end - copy, 1)
    found = tl.where(period <= best, num_drafts, tl.minimum(period, num_drafts))
    found = tl.where(copy > 0, found, 0)
    guess = tl.load(history + copy + column % period, mask=column < found, other=0)
    tl.store(drafts + row * num_drafts + column, guess, mask=column < num_drafts)
    tl.store(number + row, found)


def ngram_lookup_gpu(
    tokens: Tensor,
    length: Tensor,
    slot: Tensor,
    logits_start: Tensor,
    num_drafts: int,
    shortest: int,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """`ngram_lookup_reference` in one kernel."""
    assert tokens.is_contiguous() and slot.is_contiguous() and length.is_contiguous() and logits_start.is_contiguous()
    assert tokens.dtype == slot.dtype == torch.int64 and length.dtype == logits_start.dtype == torch.int32
    rows = slot.shape[0]
    drafts = torch.empty((rows, num_drafts), dtype=torch.int64, device=tokens.device)
    number = torch.empty(rows, dtype=torch.int32, device=tokens.device)
    overlap = overlaps(tokens)
    _ngram_kernel[(rows,)](
        tokens,
        length,
        slot,
        logits_start,
        drafts,
        number,
        tokens.shape[1],
        num_drafts,
        shortest,
        longest,
        DRAFTS=next_power_of_2(num_drafts),
        BLOCK=_BLOCK,
        PDL=overlap,
        num_warps=8,
        **launch(overlap),
    )
    return drafts, number
