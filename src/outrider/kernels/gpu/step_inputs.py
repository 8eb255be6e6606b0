"""A step's inputs in one kernel: programs of query tokens, then programs of rows. See `kernels.step_inputs`.

Every program sums the counts of all rows itself: they are few, and a sum waits for no other program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, jit_counts, launch, next_power_of_2, overlaps, tl, wait
from outrider.tensors import PagedRows, Slots, StepBatch

_TABLE_BLOCK = 1024
_TILE = 4096


def tile(num_rows: int) -> tuple[int, int]:
    """ROWS, no less than num_rows, and BLOCK, how many items a program compares with every row's end."""
    rows = max(16, next_power_of_2(num_rows))
    return rows, max(8, min(256, _TILE // rows))


@jit
def owner(counts, item, num_rows):
    """The row that owns each item, that row's first item, and the number of owned items.

    counts [ROWS] int32, 0 from num_rows on; item [BLOCK] int32. Items past the last belong to the last row.
    """
    end = tl.cumsum(counts, 0)
    over = end[None, :] <= item[:, None]
    row = tl.minimum(tl.sum(over.to(tl.int32), 1), num_rows - 1)
    return row, tl.sum(tl.where(over, counts[None, :], 0), 1), tl.sum(counts, 0)


@jit
def _query_tokens(
    program, tokens, length, computed, table, drafts, slot, num_tokens,
    slot_stride, tokens_stride, input_ids, positions, cache_slot, num_rows, num_query, max_len, max_blocks,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    every = tl.arange(0, ROWS)
    counts = tl.load(num_tokens + every * tokens_stride, mask=every < num_rows, other=0).to(tl.int32)
    item = program * BLOCK + tl.arange(0, BLOCK)
    row, start, total = owner(counts, item, num_rows)
    real = (item < total) & (item < num_query)
    at = tl.load(slot + row * slot_stride, mask=real, other=0).to(tl.int64)
    position = tl.load(computed + at, mask=real, other=0) + item - start
    past = position - tl.load(length + at, mask=real, other=0)
    known = real
    guess = tl.zeros([BLOCK], tl.int64)
    if WIDTH > 0:
        known = real & (past < 0)
        guess = tl.load(drafts + at * WIDTH + tl.minimum(past, WIDTH - 1), mask=real & (past >= 0), other=0)
    token = tl.load(tokens + at * max_len + tl.minimum(position, max_len - 1), mask=known, other=0)
    block = tl.load(table + at * max_blocks + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
    cache_index = block * BLOCK_SIZE + position % BLOCK_SIZE
    inside = item < num_query
    tl.store(input_ids + item, tl.where(known, token, guess), mask=inside)
    tl.store(positions + item, tl.where(real, position, 0).to(tl.int64), mask=inside)
    tl.store(cache_slot + item, tl.where(real, cache_index, -1), mask=inside)


@jit
def _row(
    row, at, computed, drafts, slot, num_tokens, num_drafts, ends_prompt,
    slot_stride, tokens_stride, drafts_stride, ends_stride,
    query_start, seq_lens, row_slot, row_drafts, row_guesses, logits_start, logits_index, logits_slot, logits_position,
    num_rows, num_logits,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    every = tl.arange(0, ROWS)
    there = every < num_rows
    counts = tl.load(num_tokens + every * tokens_stride, mask=there, other=0).to(tl.int32)
    drafted = tl.load(num_drafts + every * drafts_stride, mask=there, other=0).to(tl.int32)
    ends = tl.load(ends_prompt + every * ends_stride, mask=there, other=0).to(tl.int32)
    owned = (drafted + 1) * ends
    done = tl.load(computed + at)

    own_tokens = tl.sum(tl.where(every == row, counts, 0), 0)
    own_logits = tl.sum(tl.where(every == row, owned, 0), 0)
    tokens_end = tl.sum(tl.where(every <= row, counts, 0), 0)
    logits_end = tl.sum(tl.where(every <= row, owned, 0), 0)
    if row == 0:
        tl.store(query_start, 0)
        tl.store(logits_start, 0)
    tl.store(query_start + row + 1, tokens_end)
    tl.store(logits_start + row + 1, logits_end)
    tl.store(seq_lens + row, done + own_tokens)
    tl.store(row_slot + row, at)
    tl.store(row_drafts + row, tl.sum(tl.where(every == row, drafted, 0), 0))

    offset = tl.arange(0, LOGITS)
    if WIDTH > 0:
        guess = tl.load(drafts + at * WIDTH + offset, mask=offset < WIDTH)
        tl.store(row_guesses + row.to(tl.int64) * WIDTH + offset, guess, mask=offset < WIDTH)
    back = offset - own_logits  # from the row's end
    index = logits_end + back
    valid = (back < 0) & (index < num_logits)
    tl.store(logits_index + index, (tokens_end + back).to(tl.int64), mask=valid)
    tl.store(logits_slot + index, at + tl.zeros([LOGITS], tl.int64), mask=valid)
    tl.store(logits_position + index, (done + own_tokens + back + 1).to(tl.int64), mask=valid)

    total = tl.sum(owned, 0)
    if total < num_logits:  # the rest is read from query token 0, and called the last row's
        first = tl.min(tl.where(counts > 0, every, ROWS), 0)
        first_slot = tl.load(slot + first * slot_stride, mask=first < num_rows, other=0).to(tl.int64)
        after = tl.load(computed + first_slot, mask=first < num_rows, other=0) + 1
        last = tl.load(slot + (num_rows - 1) * slot_stride).to(tl.int64)
        for start in range(total + row * LOGITS, num_logits, num_rows * LOGITS):
            index = start + offset
            tl.store(logits_index + index, tl.zeros([LOGITS], tl.int64), mask=index < num_logits)
            tl.store(logits_slot + index, last + tl.zeros([LOGITS], tl.int64), mask=index < num_logits)
            tl.store(logits_position + index, after + tl.zeros([LOGITS], tl.int64), mask=index < num_logits)


@jit_counts("num_rows", "num_query", "num_logits")
def _assemble_kernel(
    tokens, length, computed, table, drafts, slot, num_tokens, num_drafts, ends_prompt,
    slot_stride, tokens_stride, drafts_stride, ends_stride,
    query_start, input_ids, positions, seq_lens, block_table, cache_slot, row_slot, row_drafts, row_guesses,
    logits_start, logits_index, logits_slot, logits_position,
    num_rows, num_query, num_logits, max_len, max_blocks,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOGITS: tl.constexpr,
    TABLE_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    program = tl.program_id(0)
    token_programs = tl.cdiv(num_query, BLOCK)
    table_programs = tl.cdiv(max_blocks, TABLE_BLOCK)
    wait(PDL)
    if program < token_programs:
        _query_tokens(
            program, tokens, length, computed, table, drafts, slot, num_tokens,
            slot_stride, tokens_stride, input_ids, positions, cache_slot, num_rows, num_query, max_len, max_blocks,
            WIDTH, BLOCK_SIZE, ROWS, BLOCK,
        )  # fmt: skip
    else:
        row, chunk = (program - token_programs) // table_programs, (program - token_programs) % table_programs
        at = tl.load(slot + row * slot_stride).to(tl.int64)
        column = chunk * TABLE_BLOCK + tl.arange(0, TABLE_BLOCK)
        block = tl.load(table + at * max_blocks + column, mask=column < max_blocks)
        if chunk == 0:
            _row(
                row, at, computed, drafts, slot, num_tokens, num_drafts, ends_prompt,
                slot_stride, tokens_stride, drafts_stride, ends_stride,
                query_start, seq_lens, row_slot, row_drafts, row_guesses,
                logits_start, logits_index, logits_slot, logits_position, num_rows, num_logits,
                WIDTH, ROWS, LOGITS,
            )  # fmt: skip
        tl.store(block_table + row.to(tl.int64) * max_blocks + column, block, mask=column < max_blocks)


def assemble_gpu(
    slots: Slots,
    plan: Tensor,
    num_query: int,
    num_logits: int,
    block_size: int,
) -> StepBatch:
    """`assemble_reference` in one kernel."""
    slot, num_tokens, num_drafts, ends_prompt = plan.unbind(1)
    assert slots.tokens.is_contiguous() and slots.block_table.is_contiguous() and slots.draft_tokens.is_contiguous()
    device, size = slot.device, slot.shape[0]
    max_len, max_blocks, width = slots.tokens.shape[1], slots.block_table.shape[1], slots.draft_tokens.shape[1]

    def new_int64(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    def new_int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    batch = StepBatch(
        slot=new_int64(size),
        input_ids=new_int64(num_query),
        rows=PagedRows(
            positions=new_int64(num_query),
            cache_slot=new_int64(num_query),
            block_table=new_int32(size, max_blocks),
            query_start=new_int32(size + 1),
            seq_lens=new_int32(size),
        ),
        num_drafts=new_int32(size),
        draft_tokens=new_int64(size, width),
        logits_start=new_int32(size + 1),
        logits_index=new_int64(num_logits),
        logits_slot=new_int64(num_logits),
        logits_position=new_int64(num_logits),
    )
    rows, block = tile(size)
    overlap = overlaps(slot)
    _assemble_kernel[(-(-num_query // block) + size * -(-max_blocks // _TABLE_BLOCK),)](
        slots.tokens,
        slots.length,
        slots.computed,
        slots.block_table,
        slots.draft_tokens,
        slot,
        num_tokens,
        num_drafts,
        ends_prompt,
        slot.stride(0),
        num_tokens.stride(0),
        num_drafts.stride(0),
        ends_prompt.stride(0),
        batch.rows.query_start,
        batch.input_ids,
        batch.rows.positions,
        batch.rows.seq_lens,
        batch.rows.block_table,
        batch.rows.cache_slot,
        batch.slot,
        batch.num_drafts,
        batch.draft_tokens,
        batch.logits_start,
        batch.logits_index,
        batch.logits_slot,
        batch.logits_position,
        size,
        num_query,
        num_logits,
        max_len,
        max_blocks,
        WIDTH=width,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        BLOCK=block,
        LOGITS=next_power_of_2(width + 1),
        TABLE_BLOCK=_TABLE_BLOCK,
        PDL=overlap,
        **launch(overlap),
    )
    return batch
