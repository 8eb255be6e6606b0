"""`kernels.accept_drafts` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import Kernel, larger, pointer
from outrider.kernels.sample import NO_TOKEN


@Kernel
def _accept_drafts_kernel(
    choice_at: int,
    is_accepted_at: int,
    compare: bool,
    logits_start_at: int,
    drafts_at: int,
    tokens_at: int,
    count_at: int,
    invalid_at: int,
    num_rows: int,
    num_logits: int,
    width: int,
) -> None:
    choice = carray(pointer(choice_at), (num_logits,), np.int64)
    is_accepted = carray(pointer(is_accepted_at), (num_logits,), np.uint8)
    logits_start = carray(pointer(logits_start_at), (num_rows + 1,), np.int32)
    drafts = carray(pointer(drafts_at), (num_rows, width), np.int64)
    tokens = carray(pointer(tokens_at), (num_rows, width + 1), np.int64)
    count = carray(pointer(count_at), (num_rows,), np.int32)
    invalid = carray(pointer(invalid_at), (num_rows,), np.uint8)
    for row in range(num_rows):
        start = logits_start[row]
        owned = logits_start[row + 1] - start
        gained = 0
        invalid[row] = 0
        if owned > 0:
            while gained < owned - 1:
                draft, own = drafts[row, gained], choice[start + gained]
                if own == NO_TOKEN or not (draft == own if compare else is_accepted[start + gained] != 0):
                    break
                tokens[row, gained] = draft
                gained += 1
            last = choice[start + gained]
            tokens[row, gained] = larger(last, 0)
            invalid[row] = last == NO_TOKEN
            gained += 1
        count[row] = gained
        for i in range(gained, width + 1):
            tokens[row, i] = -1


def accept_drafts_cpu(
    choice: Tensor, is_accepted: Tensor | None, logits_start: Tensor, draft_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`accept_drafts_reference` in one call."""
    draft_tokens = draft_tokens.contiguous()
    assert choice.is_contiguous() and (
        is_accepted is None or (is_accepted.is_contiguous() and is_accepted.dtype == torch.bool)
    )
    assert choice.dtype == draft_tokens.dtype == torch.int64 and logits_start.dtype == torch.int32
    rows, width = draft_tokens.shape
    tokens = torch.empty((rows, width + 1), dtype=torch.int64)
    count = torch.empty(rows, dtype=torch.int32)
    invalid = torch.empty(rows, dtype=torch.bool)
    _accept_drafts_kernel.launch(
        choice.data_ptr(),
        0 if is_accepted is None else is_accepted.data_ptr(),
        is_accepted is None,
        logits_start.data_ptr(),
        draft_tokens.data_ptr(),
        tokens.data_ptr(),
        count.data_ptr(),
        invalid.data_ptr(),
        rows,
        choice.shape[0],
        width,
    )
    return tokens, count, invalid
