"""What a step leaves in the slots: the verdict, and the drafts for the next step.

Rows of a step name distinct slots; rows that pad a batch may share one that belongs to no request.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.gpu.commit import commit_gpu, store_draft_gpu
from outrider.kernels.native import compiled, pointer
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
    committed = batch.query_start.diff() + torch.where(verdict.count > 0, gained - 1 - batch.num_drafts, 0)

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
        real = batch.query_start.diff() > 0
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
    kernels={"cpu": commit_cpu, "cuda": commit_gpu},
    examples=_commit_examples,
    outputs=("slots",),
    tolerance=0.0,
    why="indices",
)

STORE_DRAFT = Op(
    name="store_draft",
    reference=store_draft_reference,
    kernels={"cuda": store_draft_gpu},
    examples=_store_examples,
    outputs=("slots",),
    tolerance=0.0,
    why="indices",
)
