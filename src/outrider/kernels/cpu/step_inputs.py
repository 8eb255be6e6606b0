"""`kernels.step_inputs` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import compiled, pointer
from outrider.tensors import Slots, StepBatch


@compiled()
def _assemble_kernel(
    tokens_at: int,
    length_at: int,
    computed_at: int,
    table_at: int,
    drafts_at: int,
    slot_at: int,
    num_tokens_at: int,
    num_drafts_at: int,
    ends_prompt_at: int,
    stride: int,
    wide_at: int,
    narrow_at: int,
    num_rows: int,
    num_query: int,
    num_logits: int,
    num_slots: int,
    max_len: int,
    width: int,
    max_blocks: int,
    block_size: int,
) -> None:
    tokens = carray(pointer(tokens_at), (num_slots, max_len), np.int64)
    length = carray(pointer(length_at), (num_slots,), np.int32)
    computed = carray(pointer(computed_at), (num_slots,), np.int32)
    table = carray(pointer(table_at), (num_slots, max_blocks), np.int32)
    drafts = carray(pointer(drafts_at), (num_slots, width), np.int64)
    slots = carray(pointer(slot_at), (num_rows * stride,), np.int64)
    counts = carray(pointer(num_tokens_at), (num_rows * stride,), np.int64)
    drafted = carray(pointer(num_drafts_at), (num_rows * stride,), np.int64)
    ends = carray(pointer(ends_prompt_at), (num_rows * stride,), np.int64)
    wide = carray(pointer(wide_at), (3 * num_query + 3 * num_logits + num_rows + num_rows * width,), np.int64)
    input_ids, positions, cache_slot = wide[:num_query], wide[num_query : 2 * num_query], wide[2 * num_query :]
    by_logits = wide[3 * num_query :]
    logits_index, logits_slot = by_logits[:num_logits], by_logits[num_logits : 2 * num_logits]
    logits_position, row_slot = by_logits[2 * num_logits :], by_logits[3 * num_logits :]
    row_guesses = by_logits[3 * num_logits + num_rows :]
    narrow = carray(pointer(narrow_at), (4 * num_rows + 2 + num_rows * max_blocks,), np.int32)
    query_start, logits_start = narrow[: num_rows + 1], narrow[num_rows + 1 : 2 * num_rows + 2]
    seq_lens, row_drafts = narrow[2 * num_rows + 2 :], narrow[3 * num_rows + 2 :]
    block_table = narrow[4 * num_rows + 2 :]

    query, spoken = 0, 0
    query_start[0] = logits_start[0] = 0
    for row in range(num_rows):
        slot, num_tokens, num_drafts = slots[row * stride], counts[row * stride], drafted[row * stride]
        done = computed[slot]
        for position in range(done, done + num_tokens):
            past = position - length[slot]
            if past < 0 or width == 0:
                input_ids[query] = tokens[slot, min(position, max_len - 1)]
            else:
                input_ids[query] = drafts[slot, min(past, width - 1)]
            positions[query] = position
            block = np.int64(table[slot, position // block_size])
            cache_slot[query] = block * block_size + position % block_size
            query += 1
        if ends[row * stride]:
            for place in range(query - num_drafts - 1, query):
                logits_index[spoken] = place
                logits_slot[spoken] = slot
                logits_position[spoken] = positions[place] + 1
                spoken += 1
        query_start[row + 1], logits_start[row + 1] = query, spoken
        row_slot[row], seq_lens[row], row_drafts[row] = slot, done + num_tokens, num_drafts
        for i in range(max_blocks):
            block_table[row * max_blocks + i] = table[slot, i]
        for i in range(width):
            row_guesses[row * width + i] = drafts[slot, i]
    for i in range(query, num_query):
        input_ids[i], positions[i], cache_slot[i] = 0, 0, -1
    for i in range(spoken, num_logits):
        logits_index[i], logits_slot[i], logits_position[i] = 0, row_slot[num_rows - 1], positions[0] + 1


def assemble_cpu(
    slots: Slots,
    slot: Tensor,
    num_tokens: Tensor,
    num_drafts: Tensor,
    ends_prompt: Tensor,
    num_query: int,
    num_logits: int,
    block_size: int,
) -> StepBatch:
    """One call that fills two buffers, of which the batch's tensors are views."""
    assert slots.tokens.is_contiguous() and slots.block_table.is_contiguous() and slots.draft_tokens.is_contiguous()
    columns = slot.long(), num_tokens.long(), num_drafts.long(), ends_prompt.long()
    size, stride = slot.shape[0], slot.stride(0)
    if any(column.stride(0) != stride for column in columns):
        slot, num_tokens, num_drafts, ends_prompt = (column.contiguous() for column in columns)
        columns, stride = (slot, num_tokens, num_drafts, ends_prompt), 1
    num_slots, max_len = slots.tokens.shape
    max_blocks, width = slots.block_table.shape[1], slots.draft_tokens.shape[1]
    wide = torch.empty(3 * num_query + 3 * num_logits + size + size * width, dtype=torch.int64)
    narrow = torch.empty(4 * size + 2 + size * max_blocks, dtype=torch.int32)
    _assemble_kernel(
        slots.tokens.data_ptr(),
        slots.length.data_ptr(),
        slots.computed.data_ptr(),
        slots.block_table.data_ptr(),
        slots.draft_tokens.data_ptr(),
        columns[0].data_ptr(),
        columns[1].data_ptr(),
        columns[2].data_ptr(),
        columns[3].data_ptr(),
        stride,
        wide.data_ptr(),
        narrow.data_ptr(),
        size,
        num_query,
        num_logits,
        num_slots,
        max_len,
        width,
        max_blocks,
        block_size,
    )
    input_ids, positions, cache_slot, logits_index, logits_slot, logits_position, slot, guesses = wide.split_with_sizes(
        [num_query] * 3 + [num_logits] * 3 + [size, size * width]
    )
    query_start, logits_start, seq_lens, drafts, block_table = narrow.split_with_sizes(
        [size + 1, size + 1, size, size, size * max_blocks]
    )
    return StepBatch(
        slot=slot,
        query_start=query_start,
        input_ids=input_ids,
        positions=positions,
        seq_lens=seq_lens,
        block_table=block_table.view(size, max_blocks),
        cache_slot=cache_slot,
        num_drafts=drafts,
        draft_tokens=guesses.view(size, width),
        logits_start=logits_start,
        logits_index=logits_index,
        logits_slot=logits_slot,
        logits_position=logits_position,
    )
