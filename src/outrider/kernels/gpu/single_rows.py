"""The single-row passes of a draft head, all in one kernel. See `kernels.single_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit_counts, launch, overlaps, tl, wait

_BLOCK = 128
_ALIGN = 4  # elements: every pass's int32 then start at a multiple of 16 bytes, for which Triton compiles once


@jit_counts("num_requests", "stride")
def _single_rows_kernel(
    logits_index, guess_position, length, table, query_start, bonus, guesses, seq_lens, positions, cache_slot,
    num_requests, stride, max_blocks,
    DRAFTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    step = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_requests
    wait(PDL)
    first = tl.load(guess_position + row * DRAFTS, mask=inside, other=0)
    tl.store(guesses + step * stride + row, first + step, mask=inside)
    if step == 0:
        tl.store(query_start + row, row, mask=row <= num_requests)
        tl.store(bonus + row, tl.load(logits_index + row * DRAFTS, mask=inside), mask=inside)
    else:
        active = inside & (step < tl.load(length + row, mask=inside, other=0))
        own = tl.where(active, first - 2 + step, 0)
        block = tl.load(table + row.to(tl.int64) * max_blocks + own // BLOCK_SIZE, mask=active, other=0).to(tl.int64)
        out = (step - 1) * stride + row
        tl.store(seq_lens + out, (own + 1).to(tl.int32), mask=inside)
        tl.store(positions + out, own, mask=inside)
        tl.store(cache_slot + out, tl.where(active, block * BLOCK_SIZE + own % BLOCK_SIZE, -1), mask=inside)


def single_rows_gpu(
    logits_index: Tensor,
    guess_position: Tensor,
    length: Tensor,
    block_table: Tensor,
    num_drafts: int,
    block_size: int,
) -> tuple[Tensor, ...]:
    """`single_rows_reference` in one kernel; what is a pass's starts at a multiple of 16 bytes."""
    assert logits_index.is_contiguous() and guess_position.is_contiguous() and block_table.is_contiguous()
    device, size = length.device, length.shape[0]
    stride = -(-size // _ALIGN) * _ALIGN

    def by_pass(passes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(passes, stride, dtype=dtype, device=device)[:, :size]

    query_start = torch.empty(size + 1, dtype=torch.int32, device=device)
    bonus = torch.empty(size, dtype=torch.int64, device=device)
    guesses = by_pass(num_drafts, torch.int64)
    seq_lens = by_pass(num_drafts - 1, torch.int32)
    positions, cache_slot = (by_pass(num_drafts - 1, torch.int64) for _ in range(2))
    overlap = overlaps(length)
    _single_rows_kernel[(num_drafts, -(-(size + 1) // _BLOCK))](
        logits_index,
        guess_position,
        length,
        block_table,
        query_start,
        bonus,
        guesses,
        seq_lens,
        positions,
        cache_slot,
        size,
        stride,
        block_table.shape[1],
        DRAFTS=num_drafts,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        PDL=overlap,
        **launch(overlap),
    )
    return query_start, bonus, guesses, seq_lens, positions, cache_slot
