"""`kernels.ngram` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import Kernel, pointer


@Kernel
def _ngram_kernel(
    tokens_at: int,
    length_at: int,
    slot_at: int,
    logits_start_at: int,
    drafts_at: int,
    number_at: int,
    num_rows: int,
    num_slots: int,
    max_len: int,
    num_drafts: int,
    shortest: int,
    longest: int,
) -> None:
    tokens = carray(pointer(tokens_at), (num_slots, max_len), np.int64)
    length = carray(pointer(length_at), (num_slots,), np.int32)
    slot = carray(pointer(slot_at), (num_rows,), np.int64)
    logits_start = carray(pointer(logits_start_at), (num_rows + 1,), np.int32)
    drafts = carray(pointer(drafts_at), (num_rows, num_drafts), np.int64)
    number = carray(pointer(number_at), (num_rows,), np.int32)
    for row in range(num_rows):
        history = tokens[slot[row]]
        end = np.int64(length[slot[row]])
        best, copy = shortest - 1, 0
        if logits_start[row + 1] > logits_start[row]:
            for copy_end in range(end - 1, 0, -1):
                # Only a longer copy matters, so its token that far back must agree too.
                if (
                    copy_end <= best
                    or history[copy_end - 1] != history[end - 1]
                    or history[copy_end - 1 - best] != history[end - 1 - best]
                ):
                    continue
                run = 1
                while run < longest and run < copy_end and history[copy_end - 1 - run] == history[end - 1 - run]:
                    run += 1
                if run > best:
                    best, copy = run, copy_end
                    if best == longest:
                        break
        period = int(end - copy)
        found = 0
        if copy > 0:
            found = num_drafts if period <= best or period >= num_drafts else period
        number[row] = found
        for i in range(num_drafts):
            drafts[row, i] = history[copy + i % period] if i < found else 0


def ngram_lookup_cpu(
    tokens: Tensor,
    length: Tensor,
    slot: Tensor,
    logits_start: Tensor,
    num_drafts: int,
    shortest: int,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """Scans backwards and stops at the first copy of the greatest length."""
    rows = slot.shape[0]
    assert (
        tokens.is_contiguous()
        and slot.is_contiguous()
        and slot.dtype == torch.int64
        and logits_start.dtype == torch.int32
    )
    drafts = torch.empty((rows, num_drafts), dtype=torch.int64)
    number = torch.empty(rows, dtype=torch.int32)
    _ngram_kernel.launch(
        tokens.data_ptr(),
        length.data_ptr(),
        slot.data_ptr(),
        logits_start.data_ptr(),
        drafts.data_ptr(),
        number.data_ptr(),
        rows,
        tokens.shape[0],
        tokens.shape[1],
        num_drafts,
        shortest,
        longest,
    )
    return drafts, number
