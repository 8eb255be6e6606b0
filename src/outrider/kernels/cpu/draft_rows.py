"""`kernels.draft_rows` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import compiled, pointer
from outrider.kernels.records import DraftRows
from outrider.tensors import Slots, StepBatch


@compiled()
def _draft_rows_kernel(
    tokens_at: int,
    committed_length_at: int,
    slot_at: int,
    query_start_at: int,
    seq_lens_at: int,
    table_at: int,
    logits_start_at: int,
    committed_at: int,
    wide_at: int,
    narrow_at: int,
    size: int,
    num_query: int,
    num_slots: int,
    max_len: int,
    max_blocks: int,
    num_drafts: int,
    num_masks: int,
    limit: int,
    mask_token: int,
    block_size: int,
) -> None:
    tokens = carray(pointer(tokens_at), (num_slots, max_len), np.int64)
    slot = carray(pointer(slot_at), (size,), np.int64)
    target_start = carray(pointer(query_start_at), (size + 1,), np.int32)
    target_lens = carray(pointer(seq_lens_at), (size,), np.int32)
    table = carray(pointer(table_at), (size, max_blocks), np.int32)
    logits_start = carray(pointer(logits_start_at), (size + 1,), np.int32)
    committed = carray(pointer(committed_at), (size,), np.int32)
    num_rows = num_query + size * num_masks
    committed_length = carray(pointer(committed_length_at), (num_slots,), np.int32)
    wide = carray(pointer(wide_at), (4 * num_rows + 3 * size * num_drafts,), np.int64)
    input_ids, source = wide[:num_rows], wide[num_rows : 2 * num_rows]
    positions, cache_slot = wide[2 * num_rows : 3 * num_rows], wide[3 * num_rows : 4 * num_rows]
    by_guess = wide[4 * num_rows :]
    logits_index, guess_slot = by_guess[: size * num_drafts], by_guess[size * num_drafts : 2 * size * num_drafts]
    guess_position = by_guess[2 * size * num_drafts :]
    narrow = carray(pointer(narrow_at), (3 * size + 1,), np.int32)
    query_start, seq_lens, length = narrow[: size + 1], narrow[size + 1 : 2 * size + 1], narrow[2 * size + 1 :]

    at = 0
    query_start[0] = 0
    for row in range(size):
        start = target_lens[row] - (target_start[row + 1] - target_start[row])
        stand = committed[row]
        speaks = logits_start[row + 1] > logits_start[row]
        bonus = at + stand - 1
        count = max(min(stand + (num_masks if speaks else 0), limit - start), 0)
        for place in range(count):
            position = start + place
            if place < stand:
                input_ids[at] = tokens[slot[row], min(position + 1, max_len - 1)]
                source[at] = target_start[row] + place
            else:
                input_ids[at] = mask_token
                source[at] = num_query
            positions[at] = position
            cache_slot[at] = np.int64(table[row, position // block_size]) * block_size + position % block_size
            at += 1
        query_start[row + 1] = at
        seq_lens[row] = start + count
        length[row] = min(max(limit - (start + stand - 1), 0), num_drafts) if speaks else 0
        for guess in range(num_drafts):
            logits_index[row * num_drafts + guess] = min(max(bonus + min(guess, num_masks), 0), num_rows - 1)
            guess_slot[row * num_drafts + guess] = slot[row]
            guess_position[row * num_drafts + guess] = committed_length[slot[row]] + guess
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
) -> DraftRows:
    """One call that fills two buffers, of which the results are views."""
    size, num_query = batch.slot.shape[0], batch.input_ids.shape[0]
    num_rows = num_query + size * num_masks
    assert slots.tokens.is_contiguous() and batch.block_table.is_contiguous() and committed.dtype == torch.int32
    wide = torch.empty(4 * num_rows + 3 * size * num_drafts, dtype=torch.int64)
    narrow = torch.empty(3 * size + 1, dtype=torch.int32)
    _draft_rows_kernel(
        slots.tokens.data_ptr(),
        slots.length.data_ptr(),
        batch.slot.data_ptr(),
        batch.query_start.data_ptr(),
        batch.seq_lens.data_ptr(),
        batch.block_table.data_ptr(),
        batch.logits_start.data_ptr(),
        committed.data_ptr(),
        wide.data_ptr(),
        narrow.data_ptr(),
        size,
        num_query,
        slots.tokens.shape[0],
        slots.tokens.shape[1],
        batch.block_table.shape[1],
        num_drafts,
        num_masks,
        limit,
        mask_token,
        block_size,
    )
    by_row_and_guess = wide.split_with_sizes([num_rows] * 4 + [size * num_drafts] * 3)
    return *narrow.split_with_sizes([size + 1, size, size]), *by_row_and_guess
