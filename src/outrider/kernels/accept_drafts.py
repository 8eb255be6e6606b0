"""From the target's choice at every logits row to what each row of the step gains."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op
from outrider.kernels.sample import NO_TOKEN


def accept_drafts_reference(
    choice: Tensor,  # [L] int64, the token to take at each row of logits if no draft is accepted there, or NO_TOKEN
    is_accepted: Tensor | None,  # [L] bool, whether the draft there is accepted; None: iff it equals the choice
    logits_start: Tensor,  # [B+1] int32
    draft_tokens: Tensor,  # [B, K] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, K+1] int64, count [B] int32 and invalid [B] bool of a `Verdict`.

    A row that owns n + 1 logits rows has n drafts, n <= K. It gains the drafts before the first that
    is not accepted, then the choice there; -1 follows. A row that owns none gains nothing.
    No draft is accepted where the choice is NO_TOKEN. A row that ends there is invalid, and gains token 0 for it.
    """
    width = draft_tokens.shape[1]
    column = torch.arange(width + 1, device=choice.device)
    num_drafts = logits_start.diff()[:, None] - 1
    index = (logits_start[:-1, None] + column).clamp(max=choice.shape[0])
    own = torch.nn.functional.pad(choice, (0, 1), value=-1)[index]
    padded = None if is_accepted is None else torch.nn.functional.pad(is_accepted, (0, 1))
    passed = own[:, :-1] == draft_tokens if padded is None else padded[index[:, :-1]]
    accepted = (passed & (own[:, :-1] != NO_TOKEN) & (column[:-1] < num_drafts)).cumprod(dim=1).sum(dim=1, keepdim=True)
    count = torch.where(num_drafts >= 0, accepted + 1, 0)
    drafts = torch.nn.functional.pad(draft_tokens, (0, 1))
    tokens = torch.where(column < accepted, drafts, own.clamp(min=0))
    invalid = (own.gather(1, accepted) == NO_TOKEN) & (count > 0)
    return torch.where(column < count, tokens, -1), count[:, 0].int(), invalid[:, 0]


ACCEPT_DRAFTS = Op(
    name="accept_drafts",
    reference=accept_drafts_reference,
    tolerance=0.0,
    why="tokens",
)
