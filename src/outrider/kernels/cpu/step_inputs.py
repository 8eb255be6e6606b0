"""`kernels.step_inputs` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.addresses import SlotTables, slots_of
from outrider.kernels.cpu.jit import Kernel, pointer, smaller
from outrider.tensors import PagedRows, Slots, StepBatch


@Kernel
def _assemble_kernel(
    tables: SlotTables,
    plan_at: int,
    num_rows: int,
    num_query: int,
    num_logits: int,
    int64_at: int,
    int32_at: int,
    block_size: int,
) -> None:
    num_slots, max_len, max_blocks, width = tables.num_slots, tables.max_len, tables.max_blocks, tables.num_drafts
    tokens = carray(pointer(tables.tokens), (num_slots, max_len), np.int64)
    length = carray(pointer(tables.length), (num_slots,), np.int32)
    computed = carray(pointer(tables.computed), (num_slots,), np.int32)
    table = carray(pointer(tables.block_table), (num_slots, max_blocks), np.int32)
    drafts = carray(pointer(tables.draft_tokens), (num_slots, width), np.int64)
    plan = carray(pointer(plan_at), (num_rows, 4), np.int64)
    int64_buffer = carray(pointer(int64_at), (3 * num_query + 3 * num_logits + num_rows + num_rows * width,), np.int64)
    input_ids, positions, cache_slot = (
        int64_buffer[:num_query],
        int64_buffer[num_query : 2 * num_query],
        int64_buffer[2 * num_query :],
    )
    by_logits = int64_buffer[3 * num_query :]
    logits_index, logits_slot = by_logits[:num_logits], by_logits[num_logits : 2 * num_logits]
    logits_position, row_slot = by_logits[2 * num_logits :], by_logits[3 * num_logits :]
    row_draft_tokens = by_logits[3 * num_logits + num_rows :]
    int32_buffer = carray(pointer(int32_at), (4 * num_rows + 2 + num_rows * max_blocks,), np.int32)
    query_start, logits_start = int32_buffer[: num_rows + 1], int32_buffer[num_rows + 1 : 2 * num_rows + 2]
    seq_lens, row_drafts = int32_buffer[2 * num_rows + 2 :], int32_buffer[3 * num_rows + 2 :]
    block_table = int32_buffer[4 * num_rows + 2 :]

    query, sampled = 0, 0
    query_start[0] = logits_start[0] = 0
    for row in range(num_rows):
        slot, num_tokens, num_drafts = plan[row, 0], plan[row, 1], plan[row, 2]
        done = computed[slot]
        for position in range(done, done + num_tokens):
            past = position - length[slot]
            if past < 0 or width == 0:
                input_ids[query] = tokens[slot, smaller(position, max_len - 1)]
            else:
                input_ids[query] = drafts[slot, smaller(past, width - 1)]
            positions[query] = position
            block = np.int64(table[slot, position // block_size])
            cache_slot[query] = block * block_size + position % block_size
            query += 1
        if plan[row, 3] != 0:
            for index in range(query - num_drafts - 1, query):
                logits_index[sampled] = index
                logits_slot[sampled] = slot
                logits_position[sampled] = positions[index] + 1
                sampled += 1
        query_start[row + 1], logits_start[row + 1] = query, sampled
        row_slot[row], seq_lens[row], row_drafts[row] = slot, done + num_tokens, num_drafts
        for i in range(max_blocks):
            block_table[row * max_blocks + i] = table[slot, i]
        for i in range(width):
            row_draft_tokens[row * width + i] = drafts[slot, i]
    for i in range(query, num_query):
        input_ids[i], positions[i], cache_slot[i] = 0, 0, -1
    for i in range(sampled, num_logits):
        logits_index[i], logits_slot[i], logits_position[i] = 0, row_slot[num_rows - 1], positions[0] + 1


def assemble_cpu(
    slots: Slots,
    plan: Tensor,
    num_query: int,
    num_logits: int,
    block_size: int,
) -> StepBatch:
    """One call that fills two buffers, of which the batch's tensors are views."""
    assert plan.dtype == torch.int64 and plan.is_contiguous()
    tables, size = slots_of(slots), plan.shape[0]
    width, max_blocks = tables.num_drafts, tables.max_blocks
    int64_buffer = torch.empty(3 * num_query + 3 * num_logits + size + size * width, dtype=torch.int64)
    int32_buffer = torch.empty(4 * size + 2 + size * max_blocks, dtype=torch.int32)
    given = plan.data_ptr(), size, num_query, num_logits
    _assemble_kernel.launch(tables, *given, int64_buffer.data_ptr(), int32_buffer.data_ptr(), block_size)
    input_ids, positions, cache_slot, logits_index, logits_slot, logits_position, slot, guesses = (
        int64_buffer.split_with_sizes([num_query] * 3 + [num_logits] * 3 + [size, size * width])
    )
    query_start, logits_start, seq_lens, drafts, block_table = int32_buffer.split_with_sizes(
        [size + 1, size + 1, size, size, size * max_blocks]
    )
    return StepBatch(
        slot=slot,
        input_ids=input_ids,
        rows=PagedRows(
            positions=positions,
            cache_slot=cache_slot,
            block_table=block_table.view(size, max_blocks),
            query_start=query_start,
            seq_lens=seq_lens,
        ),
        num_drafts=drafts,
        draft_tokens=guesses.view(size, width),
        logits_start=logits_start,
        logits_index=logits_index,
        logits_slot=logits_slot,
        logits_position=logits_position,
    )
