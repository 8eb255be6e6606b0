"""From the target's choice at every logits row to what each row of the step gains."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.gpu.verdict import judge_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.op import Example, Op


def judge_reference(
    choice: Tensor,  # [L] int64, the target's token at each logits row if no draft stands there
    stands: Tensor | None,  # [L] bool, whether the draft there stands; None: iff it equals the choice
    logits_start: Tensor,  # [B+1] int32
    draft_tokens: Tensor,  # [B, K] int64
) -> tuple[Tensor, Tensor]:
    """tokens [B, K+1] int64 and count [B] int32 of a `Verdict`.

    A row that owns n + 1 logits rows has n drafts, n <= K. It gains the drafts before the first that
    does not stand, then the choice there; -1 follows. A row that owns none gains nothing.
    """
    width = draft_tokens.shape[1]
    column = torch.arange(width + 1, device=choice.device)
    num_drafts = logits_start.diff()[:, None] - 1
    index = (logits_start[:-1, None] + column).clamp(max=choice.shape[0])
    own = torch.nn.functional.pad(choice, (0, 1), value=-1)[index]
    padded = None if stands is None else torch.nn.functional.pad(stands, (0, 1))
    stand = own[:, :-1] == draft_tokens if padded is None else padded[index[:, :-1]]
    accepted = (stand & (column[:-1] < num_drafts)).cumprod(dim=1).sum(dim=1, keepdim=True)
    count = torch.where(num_drafts >= 0, accepted + 1, 0)
    drafts = torch.nn.functional.pad(draft_tokens, (0, 1))
    tokens = torch.where(column < accepted, drafts, own)
    return torch.where(column < count, tokens, -1), count[:, 0].int()


@compiled()
def _judge_kernel(
    choice_at: int,
    stands_at: int,
    compare: bool,
    logits_start_at: int,
    drafts_at: int,
    tokens_at: int,
    count_at: int,
    num_rows: int,
    num_logits: int,
    width: int,
) -> None:
    choice = carray(pointer(choice_at), (num_logits,), np.int64)
    stands = carray(pointer(stands_at), (num_logits,), np.uint8)
    logits_start = carray(pointer(logits_start_at), (num_rows + 1,), np.int32)
    drafts = carray(pointer(drafts_at), (num_rows, width), np.int64)
    tokens = carray(pointer(tokens_at), (num_rows, width + 1), np.int64)
    count = carray(pointer(count_at), (num_rows,), np.int32)
    for row in range(num_rows):
        start = logits_start[row]
        owned = logits_start[row + 1] - start
        gained = 0
        if owned > 0:
            while gained < owned - 1:
                draft = drafts[row, gained]
                if not (draft == choice[start + gained] if compare else stands[start + gained] != 0):
                    break
                tokens[row, gained] = draft
                gained += 1
            tokens[row, gained] = choice[start + gained]
            gained += 1
        count[row] = gained
        for i in range(gained, width + 1):
            tokens[row, i] = -1


def judge_cpu(
    choice: Tensor, stands: Tensor | None, logits_start: Tensor, draft_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """`judge_reference` in one call."""
    draft_tokens = draft_tokens.contiguous()
    assert choice.is_contiguous() and (stands is None or (stands.is_contiguous() and stands.dtype == torch.bool))
    assert choice.dtype == draft_tokens.dtype == torch.int64 and logits_start.dtype == torch.int32
    rows, width = draft_tokens.shape
    tokens = torch.empty((rows, width + 1), dtype=torch.int64)
    count = torch.empty(rows, dtype=torch.int32)
    _judge_kernel(
        choice.data_ptr(),
        0 if stands is None else stands.data_ptr(),
        stands is None,
        logits_start.data_ptr(),
        draft_tokens.data_ptr(),
        tokens.data_ptr(),
        count.data_ptr(),
        rows,
        choice.shape[0],
        width,
    )
    return tokens, count


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for width, owned, padding in (
        (0, [1], 0),
        (3, [4], 0),
        (3, [0, 0], 0),
        (3, [0, 0], 2),
        (5, [1, 0, 6, 4, 2, 6, 3], 3),
        (32, [33, 1, 20], 0),
        (1, torch.randint(0, 3, (33,), generator=generator).tolist(), 1),
        (7, torch.randint(0, 9, (128,), generator=generator).tolist(), 0),
    ):
        logits_start = torch.tensor([0, *owned]).cumsum(0).int()
        choice = torch.randint(0, 2, (sum(owned) + padding,), generator=generator)
        drafts = torch.randint(0, 2, (len(owned), width), generator=generator)
        stands = torch.randint(0, 2, (sum(owned) + padding,), generator=generator).bool()
        for test in (None, stands.to(device)):
            yield {
                "choice": choice.to(device),
                "stands": test,
                "logits_start": logits_start.to(device),
                "draft_tokens": drafts.to(device),
            }


JUDGE = Op(
    name="judge",
    reference=judge_reference,
    kernels={"cpu": judge_cpu, "cuda": judge_gpu},
    examples=_examples,
    tolerance=0.0,
    why="tokens",
)
