"""What a step leaves in the slots: the verdict, and the drafts for the next step.

Rows of a step name distinct slots; rows that pad a batch may share one that belongs to no request.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op
from outrider.kernels.step_inputs import assemble_reference, example_rows, example_step
from outrider.tensors import Draft, Slots, StepBatch, Verdict


def commit_reference(slots: Slots, batch: StepBatch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Write a verdict into the slots, in place; returns committed [B] int32 and next_token [B] int64.

    Where count > 0 the tokens are appended and computed becomes length - 1; inside a prompt computed
    moves past the chunk. committed is how many of the row's query tokens stand, next_token the token
    after them: the last one appended, or the prompt's next. Tokens past max_len are dropped.
    """
    slot = batch.slot
    max_len = slots.tokens.shape[1]
    length = slots.length[slot]
    gained = torch.minimum(verdict.count, max_len - length)
    committed = batch.rows.query_start.diff() + torch.where(verdict.count > 0, gained - 1 - batch.num_drafts, 0)

    # Columns a row does not gain write back what is there; taken modulo max_len none meets another.
    column = torch.arange(verdict.tokens.shape[1], device=slot.device)
    place = (length[:, None] + column) % max_len
    there = slots.tokens[slot[:, None], place]
    written = torch.where(column < gained[:, None], verdict.tokens, there)
    slots.tokens.index_put_((slot[:, None], place), written)

    computed = slots.computed[slot] + committed
    slots.length.index_put_((slot,), length + gained)
    slots.computed.index_put_((slot,), computed)
    next_token = slots.tokens[slot, computed.clamp(max=max_len - 1).long()]
    return committed, next_token


def store_draft_reference(slots: Slots, batch: StepBatch, draft: Draft) -> None:
    """Keep a draft by slot for the row's next step, in place. What rows that pad a batch leave in theirs is not said.

    Slots keep logits only for a drafter that gives them: to a verifier stale logits would look like
    the law a guess was drawn from.
    """
    slots.draft_tokens.index_copy_(0, batch.slot, draft.tokens)
    slots.draft_length.index_copy_(0, batch.slot, draft.length)
    if slots.draft_logits is not None:
        assert draft.logits is not None, "the slots keep draft logits, but the drafter gives none"
        slots.draft_logits.index_copy_(0, batch.slot, draft.logits)


def _commit_examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    mixed = [(2, 1, 0, 1), (0, 4, 3, 1), (5, 2, 1, 1), (3, 7, 0, 0), (1, 5, 0, 1)]
    for width, rows in (
        (0, [(1, 1, 0, 1)]),
        (3, [(4, 4, 3, 1)]),
        (3, mixed),
        (32, example_rows(generator, 2, 32)),
        (1, example_rows(generator, 33, 1)),
        (7, example_rows(generator, 125, 7, num_empty=3)),
    ):
        slots, columns = example_step(generator, device, rows, width)
        num_query, num_logits = sum(row[1] for row in rows), sum(row[2] + 1 for row in rows if row[3])
        batch = assemble_reference(slots, *columns, num_query, num_logits, 4)
        part = torch.rand(len(rows), generator=generator).to(device)
        count = (columns[3] * (1 + part * (columns[2] + 1)).floor()).int()
        column = torch.arange(width + 1, device=device)
        tokens = torch.where(column < count[:, None], 20_000 + 100 * batch.slot[:, None] + column, -1)
        yield {"slots": slots, "batch": batch, "verdict": Verdict(tokens, count)}
    full = copy.deepcopy(slots)  # no room for all that is gained
    full.length[:] = full.tokens.shape[1] - 2
    full.computed[:] = full.length - 1
    yield {"slots": full, "batch": batch, "verdict": Verdict(tokens, count)}


def _store_examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for example in _commit_examples(generator, device, wide):
        slots, batch = example["slots"], example["batch"]
        size, width = batch.draft_tokens.shape
        real = batch.rows.query_start.diff() > 0
        drawn = torch.randint(0, 99, (size, width), generator=generator).to(device)
        tokens = torch.where(real[:, None], drawn, batch.draft_tokens)
        length = torch.where(real, width, slots.draft_length[batch.slot])
        yield {"slots": slots, "batch": batch, "draft": Draft(tokens, length.int(), None)}
        if 0 < size < 34 and width > 0:
            keeping = replace(slots, draft_logits=torch.zeros(len(slots.length), width, 301, device=device))
            logits = torch.randn(size, width, 301, generator=generator).to(device)
            yield {"slots": keeping, "batch": batch, "draft": Draft(tokens, length.int(), logits)}


COMMIT = Op(
    name="commit",
    reference=commit_reference,
    examples=_commit_examples,
    outputs=("slots",),
    tolerance=0.0,
    why="indices",
)

STORE_DRAFT = Op(
    name="store_draft",
    reference=store_draft_reference,
    kernels=("cuda",),
    examples=_store_examples,
    outputs=("slots",),
    tolerance=0.0,
    why="indices",
)
