"""What a step leaves in the slots: a program a row, and for draft logits a program a piece. See `kernels.commit`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait
from outrider.tensors import Draft, Slots, StepBatch, Verdict

_PIECE = 4096


@jit
def _commit_kernel(
    tokens, length, computed, slot, query_start, num_drafts, verdict, count, committed, next_token, max_len,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    wait(PDL)
    at = tl.load(slot + row)
    token = tl.load(verdict + row * WIDTH + column, mask=column < WIDTH, other=0)
    given = tl.load(count + row)
    num_tokens = tl.load(query_start + row + 1) - tl.load(query_start + row)
    drafted = tl.load(num_drafts + row)
    before = tl.load(length + at)
    done = tl.load(computed + at)

    gained = tl.minimum(given, max_len - before)
    kept = num_tokens + tl.where(given > 0, gained - 1 - drafted, 0)
    done += kept
    following = tl.minimum(done, max_len - 1)
    new = following - before  # its column, if this step appends it
    appended = (new >= 0) & (new < gained)
    text = tokens + at * max_len
    there = tl.load(text + following, mask=appended == 0, other=0)
    there = tl.where(appended, tl.sum(tl.where(column == new, token, 0), 0), there)

    tl.store(text + before + column, token, mask=column < gained)
    tl.store(length + at, before + gained)
    tl.store(computed + at, done)
    tl.store(committed + row, kept)
    tl.store(next_token + row, there)


def commit_gpu(slots: Slots, batch: StepBatch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """`commit_reference` in one kernel."""
    assert slots.tokens.is_contiguous() and batch.slot.is_contiguous() and verdict.tokens.is_contiguous()
    size, width = verdict.tokens.shape
    committed = torch.empty(size, dtype=torch.int32, device=batch.slot.device)
    next_token = torch.empty(size, dtype=torch.int64, device=batch.slot.device)
    overlap = overlaps(batch.slot)
    _commit_kernel[(size,)](
        slots.tokens,
        slots.length,
        slots.computed,
        batch.slot,
        batch.rows.query_start,
        batch.num_drafts,
        verdict.tokens,
        verdict.count,
        committed,
        next_token,
        slots.tokens.shape[1],
        WIDTH=width,
        BLOCK=next_power_of_2(width),
        PDL=overlap,
        num_warps=1,
        **launch(overlap),
    )
    return committed, next_token


@jit
def _store_draft_kernel(
    drafts, draft_length, draft_logits, slot, query_start, tokens, length, logits, kept, size,
    WIDTH: tl.constexpr, LOGITS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    wait(PDL)
    at = tl.load(slot + row)
    token = tl.load(tokens + row * WIDTH + column, mask=column < WIDTH, other=0)
    before = tl.min(tl.where(token < 0, column, BLOCK), 0)
    length_kept = tl.minimum(tl.load(length + row), before)
    if piece == 0:
        tl.store(kept + row, length_kept)
    if tl.load(query_start + row + 1) > tl.load(query_start + row):
        if piece == 0:
            tl.store(drafts + at * WIDTH + column, tl.maximum(token, 0), mask=column < WIDTH)
            tl.store(draft_length + at, length_kept)
        if LOGITS:
            index = piece * PIECE + tl.arange(0, PIECE)
            value = tl.load(logits + row * size + index, mask=index < size)
            tl.store(draft_logits + at * size + index, value, mask=index < size)


def store_draft_gpu(slots: Slots, batch: StepBatch, draft: Draft) -> Tensor:
    """`store_draft_reference` in one kernel, which leaves the slot of rows without query tokens as it is."""
    rows, width = draft.tokens.shape
    assert slots.draft_tokens.is_contiguous() and slots.draft_tokens.shape[1] == width
    size = 0
    if slots.draft_logits is not None:
        assert draft.logits is not None, "the slots keep draft logits, but the drafter gives none"
        assert slots.draft_logits.is_contiguous() and draft.logits.is_contiguous()
        assert slots.draft_logits.dtype == draft.logits.dtype
        size = draft.logits[0].numel()
    kept = torch.empty_like(draft.length)
    overlap = overlaps(batch.slot)
    _store_draft_kernel[(rows, max(1, -(-size // _PIECE)))](
        slots.draft_tokens,
        slots.draft_length,
        slots.draft_logits,
        batch.slot,
        batch.rows.query_start,
        draft.tokens.contiguous(),
        draft.length,
        draft.logits,
        kept,
        size,
        WIDTH=width,
        LOGITS=size > 0,
        BLOCK=next_power_of_2(width),
        PIECE=_PIECE,
        PDL=overlap,
        num_warps=4 if size else 1,
        **launch(overlap),
    )
    return kept
