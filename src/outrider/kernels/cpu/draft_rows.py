"""`kernels.draft_rows` on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.addresses import Rows, SlotTables, rows_of, slots_of
from outrider.kernels.cpu.jit import Kernel, larger, pointer, smaller
from outrider.kernels.records import DraftRows
from outrider.tensors import PagedRows, Slots, StepBatch


class Made(NamedTuple):
    """What is to be made: see `draft_rows_reference`."""

    num_drafts: int
    num_masks: int
    limit: int
    mask_token: int
    block_size: int
    shift: int


@Kernel
def _draft_rows_kernel(
    tables: SlotTables,
    target: Rows,
    slot_at: int,
    logits_start_at: int,
    committed_at: int,
    made: Made,
    int64_at: int,
    int32_at: int,
) -> None:
    num_drafts, num_masks, limit, mask_token, block_size, shift = made
    size, num_query, max_len, max_blocks = target.num_rows, target.num_tokens, tables.max_len, target.max_blocks
    tokens = carray(pointer(tables.tokens), (tables.num_slots, max_len), np.int64)
    committed_length = carray(pointer(tables.length), (tables.num_slots,), np.int32)
    slot = carray(pointer(slot_at), (size,), np.int64)
    target_start = carray(pointer(target.query_start), (size + 1,), np.int32)
    target_lens = carray(pointer(target.seq_lens), (size,), np.int32)
    table = carray(pointer(target.block_table), (size, max_blocks), np.int32)
    logits_start = carray(pointer(logits_start_at), (size + 1,), np.int32)
    committed = carray(pointer(committed_at), (size,), np.int32)
    num_rows = num_query + size * (1 - shift + num_masks)
    int64_buffer = carray(pointer(int64_at), (4 * num_rows + 3 * size * num_drafts,), np.int64)
    input_ids, source = int64_buffer[:num_rows], int64_buffer[num_rows : 2 * num_rows]
    positions, cache_slot = int64_buffer[2 * num_rows : 3 * num_rows], int64_buffer[3 * num_rows : 4 * num_rows]
    by_draft = int64_buffer[4 * num_rows :]
    logits_index, draft_slot = by_draft[: size * num_drafts], by_draft[size * num_drafts : 2 * size * num_drafts]
    draft_position = by_draft[2 * size * num_drafts :]
    int32_buffer = carray(pointer(int32_at), (3 * size + 1,), np.int32)
    query_start, seq_lens, length = (
        int32_buffer[: size + 1],
        int32_buffer[size + 1 : 2 * size + 1],
        int32_buffer[2 * size + 1 :],
    )

    at = 0
    query_start[0] = 0
    for row in range(size):
        start = target_lens[row] - (target_start[row + 1] - target_start[row])
        accepted = committed[row]
        owned = accepted + 1 - shift if accepted > 0 else 0
        samples = logits_start[row + 1] > logits_start[row]
        bonus = at + owned - 1
        count = larger(smaller(owned + (num_masks if samples else 0), limit - start), 0)
        for offset in range(count):
            position = start + offset
            known = offset < owned
            input_ids[at] = tokens[slot[row], smaller(position + shift, max_len - 1)] if known else mask_token
            source[at] = target_start[row] + offset if offset < accepted else num_query
            positions[at] = position
            cache_slot[at] = np.int64(table[row, position // block_size]) * block_size + position % block_size
            at += 1
        query_start[row + 1] = at
        seq_lens[row] = start + count
        length[row] = smaller(larger(limit - (start + owned - 1), 0), num_drafts) if samples else 0
        for guess in range(num_drafts):
            logits_index[row * num_drafts + guess] = smaller(larger(bonus + smaller(guess, num_masks), 0), num_rows - 1)
            draft_slot[row * num_drafts + guess] = slot[row]
            draft_position[row * num_drafts + guess] = committed_length[slot[row]] + guess
    for i in range(at, num_rows):
        input_ids[i], source[i], positions[i], cache_slot[i] = 0, 0, 0, -1


def draft_rows_cpu(
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
    """One call that fills two buffers, of which the results are views."""
    size, num_query = batch.slot.shape[0], batch.input_ids.shape[0]
    num_rows = num_query + size * (1 - shift + num_masks)
    assert committed.dtype == torch.int32
    int64_buffer = torch.empty(4 * num_rows + 3 * size * num_drafts, dtype=torch.int64)
    int32_buffer = torch.empty(3 * size + 1, dtype=torch.int32)
    at = batch.slot.data_ptr(), batch.logits_start.data_ptr(), committed.data_ptr()
    made = Made(num_drafts, num_masks, limit, mask_token, block_size, shift)
    _draft_rows_kernel.launch(
        slots_of(slots), rows_of(batch.rows), *at, made, int64_buffer.data_ptr(), int32_buffer.data_ptr()
    )
    input_ids, source, positions, cache_slot, *by_draft = int64_buffer.split_with_sizes(
        [num_rows] * 4 + [size * num_drafts] * 3
    )
    query_start, seq_lens, length = int32_buffer.split_with_sizes([size + 1, size, size])
    rows = PagedRows(positions, cache_slot, batch.rows.block_table, query_start, seq_lens)
    return DraftRows(rows, length, input_ids, source, *by_draft)
