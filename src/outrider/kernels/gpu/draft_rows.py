"""The query rows of a draft model in one kernel: programs of query rows, then a program a request.

Like those of `gpu.step_inputs`, every program sums the counts of all requests itself. See `kernels.draft_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.step_inputs import owner, tile
from outrider.kernels.gpu.triton import begin, jit, jit_counts, launch, next_power_of_2, overlaps, tl, wait
from outrider.kernels.records import DraftRows
from outrider.tensors import PagedRows, Slots, StepBatch


@jit
def _span(
    row, there, target_start, target_lens, logits_start, committed,
    MASKS: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Of requests: the first position of their query rows, how many rows are the model's, and whether they sample."""
    first = tl.load(target_lens + row, mask=there, other=0)
    first += tl.load(target_start + row, mask=there, other=0) - tl.load(target_start + row + 1, mask=there, other=0)
    owned = tl.load(logits_start + row + 1, mask=there, other=0) - tl.load(logits_start + row, mask=there, other=0)
    accepted = tl.load(committed + row, mask=there, other=0)
    wanted = _known_rows(accepted, SHIFT) + tl.where(owned > 0, MASKS, 0)
    return first, tl.maximum(tl.minimum(wanted, LIMIT - first), 0), owned > 0


@jit
def _known_rows(accepted, SHIFT: tl.constexpr):
    """How many rows have a token that is known."""
    return tl.where(accepted > 0, accepted + 1 - SHIFT, 0)


@jit
def _query_rows(
    program, counts, tokens, slot, target_start, target_lens, table, committed,
    input_ids, source, positions, cache_slot, num_requests, num_query, num_rows, max_len, max_blocks,
    MASK_TOKEN: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    item = program * BLOCK + tl.arange(0, BLOCK)
    row, start, total = owner(counts, item, num_requests)
    inside = item < num_rows
    real = (item < total) & inside
    offset = item - start
    target = tl.load(target_start + row, mask=real, other=0)
    num_tokens = tl.load(target_start + row + 1, mask=real, other=0) - target
    position = tl.load(target_lens + row, mask=real, other=0) - num_tokens + offset
    accepted = tl.load(committed + row, mask=real, other=0)
    known = real & (offset < _known_rows(accepted, SHIFT))
    at = tl.load(slot + row, mask=real, other=0)
    token = tl.load(tokens + at * max_len + tl.minimum(position + SHIFT, max_len - 1), mask=known, other=MASK_TOKEN)
    block = tl.load(table + row.to(tl.int64) * max_blocks + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
    feature = tl.where(offset < accepted, target + offset, num_query)
    tl.store(input_ids + item, tl.where(real, token, 0), mask=inside)
    tl.store(source + item, tl.where(real, feature, 0).to(tl.int64), mask=inside)
    tl.store(positions + item, tl.where(real, position, 0).to(tl.int64), mask=inside)
    tl.store(cache_slot + item, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=inside)


@jit
def _request(
    row, first, start, count, samples, length, slot, committed,
    query_start, seq_lens, draft_length, logits_index, guess_slot, guess_position, num_rows,
    DRAFTS: tl.constexpr, MASKS: tl.constexpr, LIMIT: tl.constexpr, GUESSES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    owned = _known_rows(tl.load(committed + row), SHIFT)
    at = tl.load(slot + row)
    if row == 0:
        tl.store(query_start, 0)
    tl.store(query_start + row + 1, start + count)
    tl.store(seq_lens + row, first + count)
    room = tl.minimum(tl.maximum(LIMIT - (first + owned - 1), 0), DRAFTS)
    tl.store(draft_length + row, tl.where(samples, room, 0))
    guess = tl.arange(0, GUESSES)
    index = start + owned - 1 + tl.minimum(guess, MASKS)
    index = tl.minimum(tl.maximum(index, 0), num_rows - 1)
    out = row * DRAFTS + guess
    tl.store(logits_index + out, index.to(tl.int64), mask=guess < DRAFTS)
    tl.store(guess_slot + out, at + tl.zeros([GUESSES], tl.int64), mask=guess < DRAFTS)
    tl.store(guess_position + out, (tl.load(length + at) + guess).to(tl.int64), mask=guess < DRAFTS)


@jit_counts("num_requests", "num_query")
def _draft_rows_kernel(
    tokens, length, slot, target_start, target_lens, table, logits_start, committed,
    query_start, seq_lens, draft_length, input_ids, source, positions, cache_slot,
    logits_index, guess_slot, guess_position, num_requests, num_query, max_len, max_blocks,
    DRAFTS: tl.constexpr, MASKS: tl.constexpr, LIMIT: tl.constexpr, MASK_TOKEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GUESSES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program = tl.program_id(0)
    every = tl.arange(0, ROWS)
    num_rows = num_query + num_requests * (1 - SHIFT + MASKS)
    row_programs = tl.cdiv(num_rows, BLOCK)
    wait(PDL)
    there = every < num_requests
    first, counts, samples = _span(
        every, there, target_start, target_lens, logits_start, committed, MASKS, LIMIT, SHIFT
    )  # fmt: skip
    counts = tl.where(there, counts, 0)
    if program < row_programs:
        _query_rows(
            program, counts, tokens, slot, target_start, target_lens, table, committed,
            input_ids, source, positions, cache_slot, num_requests, num_query, num_rows, max_len, max_blocks,
            MASK_TOKEN, BLOCK_SIZE, BLOCK, SHIFT,
        )  # fmt: skip
    else:
        row = program - row_programs
        own = every == row
        _request(
            row, tl.sum(tl.where(own, first, 0), 0), tl.sum(tl.where(every < row, counts, 0), 0),
            tl.sum(tl.where(own, counts, 0), 0), tl.sum(tl.where(own & samples, 1, 0), 0) > 0,
            length, slot, committed,
            query_start, seq_lens, draft_length, logits_index, guess_slot, guess_position, num_rows,
            DRAFTS, MASKS, LIMIT, GUESSES, SHIFT,
        )  # fmt: skip


def draft_rows_gpu(
    slots: Slots,
    batch: StepBatch,
    committed: Tensor,
    num_drafts: int,
    num_masks: int,
    limit: int,
    mask_token: int,
    block_size: int,
    shift: int,
) -> DraftRows:
    """`draft_rows_reference` in one kernel."""
    assert slots.tokens.is_contiguous() and batch.rows.block_table.is_contiguous() and batch.slot.is_contiguous()
    device, size, num_query = batch.slot.device, batch.slot.shape[0], batch.input_ids.shape[0]
    num_rows = num_query + size * (1 - shift + num_masks)
    query_start = torch.empty(size + 1, dtype=torch.int32, device=device)
    seq_lens, length = (torch.empty(size, dtype=torch.int32, device=device) for _ in range(2))
    by_row = [torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(4)]
    by_draft = [torch.empty(size * num_drafts, dtype=torch.int64, device=device) for _ in range(3)]
    rows, block = tile(size)
    overlap = overlaps(committed)
    _draft_rows_kernel[(-(-num_rows // block) + size,)](
        slots.tokens,
        slots.length,
        batch.slot,
        batch.rows.query_start,
        batch.rows.seq_lens,
        batch.rows.block_table,
        batch.logits_start,
        committed,
        query_start,
        seq_lens,
        length,
        *by_row,
        *by_draft,
        size,
        num_query,
        slots.tokens.shape[1],
        batch.rows.block_table.shape[1],
        DRAFTS=num_drafts,
        MASKS=num_masks,
        LIMIT=limit,
        MASK_TOKEN=mask_token,
        BLOCK_SIZE=block_size,
        SHIFT=shift,
        ROWS=rows,
        BLOCK=block,
        GUESSES=next_power_of_2(num_drafts),
        PDL=overlap,
        **launch(overlap),
    )
    input_ids, source, positions, cache_slot = by_row
    rows_of_draft = PagedRows(positions, cache_slot, batch.rows.block_table, query_start, seq_lens)
    return DraftRows(rows_of_draft, length, input_ids, source, *by_draft)
