"""`kernels.commit` on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.addresses import SlotTables, slots_of
from outrider.kernels.cpu.jit import Kernel, pointer, smaller
from outrider.tensors import Slots, StepBatch, Verdict


class Step(NamedTuple):
    """What a step's batch and its verdict say, and where the results go."""

    slot: int
    query_start: int
    num_drafts: int
    tokens: int
    counts: int
    committed: int
    next_token: int
    num_rows: int
    width: int  # of tokens


@Kernel
def _commit_kernel(tables: SlotTables, step: Step) -> None:
    num_slots, max_len, num_rows, width = tables.num_slots, tables.max_len, step.num_rows, step.width
    tokens = carray(pointer(tables.tokens), (num_slots, max_len), np.int64)
    length = carray(pointer(tables.length), (num_slots,), np.int32)
    computed = carray(pointer(tables.computed), (num_slots,), np.int32)
    slots = carray(pointer(step.slot), (num_rows,), np.int64)
    query_start = carray(pointer(step.query_start), (num_rows + 1,), np.int32)
    num_drafts = carray(pointer(step.num_drafts), (num_rows,), np.int32)
    verdict = carray(pointer(step.tokens), (num_rows, width), np.int64)
    count = carray(pointer(step.counts), (num_rows,), np.int32)
    committed = carray(pointer(step.committed), (num_rows,), np.int32)
    next_token = carray(pointer(step.next_token), (num_rows,), np.int64)
    for row in range(num_rows):
        slot = slots[row]
        gained = smaller(count[row], max_len - length[slot])
        for i in range(gained):
            tokens[slot, length[slot] + i] = verdict[row, i]
        length[slot] += gained
        kept = query_start[row + 1] - query_start[row]
        if count[row] > 0:
            kept += gained - 1 - num_drafts[row]
        committed[row] = kept
        computed[slot] += kept
        next_token[row] = tokens[slot, smaller(computed[slot], max_len - 1)]


def commit_cpu(slots: Slots, batch: StepBatch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """`commit_reference` in one call."""
    size = batch.slot.shape[0]
    assert batch.slot.is_contiguous() and verdict.tokens.is_contiguous()
    assert batch.slot.dtype == verdict.tokens.dtype == torch.int64 and verdict.count.dtype == torch.int32
    committed = torch.empty(size, dtype=torch.int32)
    next_token = torch.empty(size, dtype=torch.int64)
    step = Step(
        batch.slot.data_ptr(),
        batch.rows.query_start.data_ptr(),
        batch.num_drafts.data_ptr(),
        verdict.tokens.data_ptr(),
        verdict.count.data_ptr(),
        committed.data_ptr(),
        next_token.data_ptr(),
        size,
        verdict.tokens.shape[1],
    )
    _commit_kernel.launch(slots_of(slots), step)
    return committed, next_token
