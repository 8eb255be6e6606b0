"""What a step leaves in the slots: the verdict, and the drafts for the next step.

Rows of a step name distinct slots; rows that pad a batch may share one that belongs to no request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op
from outrider.tensors import Draft, Slots, StepBatch, Verdict


def commit_reference(slots: Slots, batch: StepBatch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Write a verdict into the slots, in place; returns committed [B] int32 and next_token [B] int64.

    Where count > 0 the tokens are appended and computed becomes length - 1; inside a prompt computed
    moves past the chunk. committed is how many of the row's query tokens are accepted, next_token the token
    after them: the last one appended, or the prompt's next. Tokens past max_len are dropped.
    """
    slot = batch.slot
    max_len = slots.tokens.shape[1]
    length = slots.length[slot]
    gained = torch.minimum(verdict.count, max_len - length)
    committed = batch.rows.query_start.diff() + torch.where(verdict.count > 0, gained - 1 - batch.num_drafts, 0)

    # Columns a row does not gain write back what is there; taken modulo max_len none meets another.
    column = torch.arange(verdict.tokens.shape[1], device=slot.device)
    index = (length[:, None] + column) % max_len
    there = slots.tokens[slot[:, None], index]
    written = torch.where(column < gained[:, None], verdict.tokens, there)
    slots.tokens.index_put_((slot[:, None], index), written)

    computed = slots.computed[slot] + committed
    slots.length.index_put_((slot,), length + gained)
    slots.computed.index_put_((slot,), computed)
    next_token = slots.tokens[slot, computed.clamp(max=max_len - 1).long()]
    return committed, next_token


def store_draft_reference(slots: Slots, batch: StepBatch, draft: Draft) -> Tensor:
    """Keep a draft by slot for the row's next step, in place; returns the length [B] int32 of what is kept.

    A row keeps the drafts before its first negative one, which stands for logits that hold no token.
    Rows that pad a batch may leave anything in their slot.

    Slots keep logits only for a drafter that gives them: to a verifier stale logits would look like
    the distribution that a guess was drawn from.
    """
    is_token = draft.tokens >= 0
    length = torch.minimum(draft.length, is_token.cumprod(dim=1).sum(dim=1, dtype=torch.int32))
    slots.draft_tokens.index_copy_(0, batch.slot, draft.tokens.clamp(min=0))
    slots.draft_length.index_copy_(0, batch.slot, length)
    if slots.draft_logits is not None:
        assert draft.logits is not None, "the slots keep draft logits, but the drafter gives none"
        slots.draft_logits.index_copy_(0, batch.slot, draft.logits)
    return length


COMMIT = Op(
    name="commit",
    reference=commit_reference,
    outputs=("slots",),
    tolerance=0.0,
    why="indices",
)

STORE_DRAFT = Op(
    name="store_draft",
    reference=store_draft_reference,
    kernels=("cuda",),
    outputs=("slots",),
    tolerance=0.0,
    why="indices",
)
