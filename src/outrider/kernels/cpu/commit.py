"""`kernels.commit` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import compiled, pointer
from outrider.tensors import Slots, StepBatch, Verdict


@compiled()
def _commit_kernel(
    tokens_at: int,
    length_at: int,
    computed_at: int,
    slot_at: int,
    query_start_at: int,
    num_drafts_at: int,
    verdict_at: int,
    count_at: int,
    committed_at: int,
    next_token_at: int,
    num_rows: int,
    num_slots: int,
    max_len: int,
    width: int,
) -> None:
    tokens = carray(pointer(tokens_at), (num_slots, max_len), np.int64)
    length = carray(pointer(length_at), (num_slots,), np.int32)
    computed = carray(pointer(computed_at), (num_slots,), np.int32)
    slots = carray(pointer(slot_at), (num_rows,), np.int64)
    query_start = carray(pointer(query_start_at), (num_rows + 1,), np.int32)
    num_drafts = carray(pointer(num_drafts_at), (num_rows,), np.int32)
    verdict = carray(pointer(verdict_at), (num_rows, width), np.int64)
    count = carray(pointer(count_at), (num_rows,), np.int32)
    committed = carray(pointer(committed_at), (num_rows,), np.int32)
    next_token = carray(pointer(next_token_at), (num_rows,), np.int64)
    for row in range(num_rows):
        slot = slots[row]
        gained = min(count[row], max_len - length[slot])
        for i in range(gained):
            tokens[slot, length[slot] + i] = verdict[row, i]
        length[slot] += gained
        stand = query_start[row + 1] - query_start[row]
        if count[row] > 0:
            stand += gained - 1 - num_drafts[row]
        committed[row] = stand
        computed[slot] += stand
        next_token[row] = tokens[slot, min(computed[slot], max_len - 1)]


def commit_cpu(slots: Slots, batch: StepBatch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """`commit_reference` in one call."""
    size = batch.slot.shape[0]
    num_slots, max_len = slots.tokens.shape
    assert slots.tokens.is_contiguous() and batch.slot.is_contiguous() and verdict.tokens.is_contiguous()
    assert batch.slot.dtype == verdict.tokens.dtype == torch.int64 and verdict.count.dtype == torch.int32
    committed = torch.empty(size, dtype=torch.int32)
    next_token = torch.empty(size, dtype=torch.int64)
    _commit_kernel(
        slots.tokens.data_ptr(),
        slots.length.data_ptr(),
        slots.computed.data_ptr(),
        batch.slot.data_ptr(),
        batch.query_start.data_ptr(),
        batch.num_drafts.data_ptr(),
        verdict.tokens.data_ptr(),
        verdict.count.data_ptr(),
        committed.data_ptr(),
        next_token.data_ptr(),
        size,
        num_slots,
        max_len,
        verdict.tokens.shape[1],
    )
    return committed, next_token
