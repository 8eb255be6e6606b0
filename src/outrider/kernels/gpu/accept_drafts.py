"""Which drafts are accepted, and what each row gains: a program a row. See `kernels.accept_drafts`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait
from outrider.kernels.sample import NO_TOKEN


@jit
def _accept_drafts_kernel(
    choice, is_accepted, logits_start, drafts, tokens, count, invalid,
    WIDTH: tl.constexpr, COMPARE: tl.constexpr, NO_TOKEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    wait(PDL)
    guess = tl.load(drafts + row * WIDTH + column, mask=column < WIDTH, other=0)
    start = tl.load(logits_start + row)
    owned = tl.load(logits_start + row + 1) - start
    own = tl.load(choice + start + column, mask=column < owned, other=NO_TOKEN)
    passed = own == guess if COMPARE else tl.load(is_accepted + start + column, mask=column < owned, other=0) != 0
    accepted = tl.min(tl.where(passed & (own != NO_TOKEN) & (column < owned - 1), BLOCK, column), 0)
    gained = tl.where(owned > 0, accepted + 1, 0)
    token = tl.where(column < accepted, guess, tl.maximum(own, 0))
    token = tl.where(column < gained, token, -1)
    tl.store(tokens + row * (WIDTH + 1) + column, token, mask=column <= WIDTH)
    tl.store(count + row, gained)
    missing = tl.sum(((column == accepted) & (own == NO_TOKEN)).to(tl.int32), 0)
    tl.store(invalid + row, (missing > 0) & (owned > 0))


def accept_drafts_gpu(
    choice: Tensor, is_accepted: Tensor | None, logits_start: Tensor, draft_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`accept_drafts_reference` in one kernel."""
    draft_tokens = draft_tokens.contiguous()
    assert (
        choice.is_contiguous() and logits_start.is_contiguous() and (is_accepted is None or is_accepted.is_contiguous())
    )
    rows, width = draft_tokens.shape
    tokens = torch.empty((rows, width + 1), dtype=torch.int64, device=choice.device)
    count = torch.empty(rows, dtype=torch.int32, device=choice.device)
    invalid = torch.empty(rows, dtype=torch.bool, device=choice.device)
    overlap = overlaps(choice)
    _accept_drafts_kernel[(rows,)](
        choice,
        None if is_accepted is None else is_accepted.view(torch.uint8),
        logits_start,
        draft_tokens,
        tokens,
        count,
        invalid.view(torch.uint8),
        WIDTH=width,
        COMPARE=is_accepted is None,
        NO_TOKEN=NO_TOKEN,
        BLOCK=next_power_of_2(width + 1),
        PDL=overlap,
        num_warps=1,
        **launch(overlap),
    )
    return tokens, count, invalid
