"""Gathering a step's inputs from the slots.

All shapes follow from B, T and L, which the host knows, so that a step can be recorded. Rows of a
step name distinct slots. A batch may be padded: rows with no query tokens, which may share one slot
that belongs to no request, then query tokens past the last row's (they go nowhere: cache_slot -1)
and logits rows past the last row's (drawn, and read by nobody).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op
from outrider.tensors import Draft, PagedRows, Slots, StepBatch


def locate(start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each of `size` items, the row that owns it and its place there: [size] int64, [size] int64.

    start is [B+1] int32. Items past start[B] are given to the last row, at a place it does not own.
    """
    item = torch.arange(size, device=start.device, dtype=start.dtype)
    row = torch.searchsorted(start[1:], item, right=True).clamp(max=start.shape[0] - 2)
    return row, (item - start[row]).long()


def _prefix_sum(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def assemble_reference(
    slots: Slots,
    slot: Tensor,  # [B] int64
    num_tokens: Tensor,  # [B], of any integer type, as are the next two
    num_drafts: Tensor,  # [B]
    ends_prompt: Tensor,  # [B], bool or 0 and 1
    num_query: int,  # T, at least the sum of num_tokens
    num_logits: int,  # L, at least the sum of num_drafts + 1 over rows that end their prompt
    block_size: int,
) -> StepBatch:
    """The step's batch, from the columns of the plan's rows: `torch.tensor(plan.rows).unbind(1)` will do.

    Query token j of a row stands at position computed + j. Its id is the committed token there, or
    past the committed ones the slot's draft.
    """
    slot, num_tokens, num_drafts, ends_prompt = (x.long() for x in (slot, num_tokens, num_drafts, ends_prompt))
    computed = slots.computed[slot].long()
    length = slots.length[slot].long()
    query_start = _prefix_sum(num_tokens)
    row, offset = locate(query_start, num_query)
    real = offset < num_tokens[row]
    positions = torch.where(real, computed[row] + offset, 0)
    token_slot = slot[row]

    max_len = slots.tokens.shape[1]
    input_ids = slots.tokens[token_slot, positions.clamp(max=max_len - 1)]
    past = positions - length[row]
    if (width := slots.draft_tokens.shape[1]) > 0:
        input_ids = torch.where(past < 0, input_ids, slots.draft_tokens[token_slot, past.clamp(0, width - 1)])
    input_ids = torch.where(real, input_ids, 0)

    block = slots.block_table[token_slot, positions // block_size].long()
    cache_slot = torch.where(real, block * block_size + positions % block_size, -1)

    owned = (num_drafts + 1) * ends_prompt
    logits_start = _prefix_sum(owned)
    owner, place = locate(logits_start, num_logits)
    logits_index = query_start[owner + 1].long() - owned[owner] + place
    logits_index = torch.where(place < owned[owner], logits_index, 0)
    return StepBatch(
        slot=slot.contiguous(),
        input_ids=input_ids,
        rows=PagedRows(
            positions=positions,
            cache_slot=cache_slot,
            block_table=slots.block_table[slot],
            query_start=query_start,
            seq_lens=(computed + num_tokens).int(),
        ),
        num_drafts=num_drafts.int(),
        draft_tokens=slots.draft_tokens[slot],
        logits_start=logits_start,
        logits_index=logits_index,
        logits_slot=slot[owner],
        logits_position=positions[logits_index] + 1,
    )


def load_draft(slots: Slots, batch: StepBatch) -> Draft:
    """The drafts a step verifies, aligned with its rows; only the first num_drafts of a row were run."""
    logits = None if slots.draft_logits is None else slots.draft_logits.index_select(0, batch.slot)
    return Draft(tokens=batch.draft_tokens, length=batch.num_drafts, logits=logits)


def example_slots(generator: torch.Generator, device: torch.device, num_slots: int, max_len: int, width: int) -> Slots:
    """Slots full of distinct values, one token behind; block 0 of a table is never used."""

    def move(table: Any) -> Any:
        return None if table is None else table.to(device)

    blocks = -(-max_len // 4)
    length = torch.randint(max_len // 4, max_len // 2, (num_slots,), generator=generator).int()
    slots = Slots(
        tokens=torch.arange(num_slots * max_len).view(num_slots, max_len),
        length=length,
        computed=length - 1,
        block_table=1 + torch.randperm(num_slots * blocks, generator=generator).view(num_slots, blocks).int(),
        temperature=torch.zeros(num_slots),
        seed=torch.arange(num_slots),
        draft_tokens=10_000 + torch.arange(num_slots * width).view(num_slots, width),
        draft_length=torch.zeros(num_slots, dtype=torch.int32),
        draft_logits=None,
    )
    return Slots(**{name: move(getattr(slots, name)) for name in Slots.__slots__})


Case = tuple[int, int, int, int]
"""A plan's row: slot, num_tokens, num_drafts, ends_prompt."""


def example_rows(generator: torch.Generator, num_rows: int, width: int, num_empty: int = 0) -> list[Case]:
    """Rows with 0 to `width` drafts, every eighth inside its prompt or at its end; then `num_empty` that pad."""
    drafts = torch.randint(0, width + 1, (num_rows,), generator=generator).tolist()
    drafts[0] = width
    rows = []
    for slot, drafted in enumerate(drafts):
        chunk = slot % 8 == 7
        rows.append((slot, 9 if chunk else drafted + 1, 0 if chunk else drafted, int(not chunk or slot % 16 == 7)))
    return rows[::-1] + [(num_rows, 0, 0, 0)] * num_empty


def example_step(
    generator: torch.Generator, device: torch.device, rows: list[Case], width: int
) -> tuple[Slots, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Slots in which such rows can be run, and the rows' columns."""
    slots = example_slots(generator, device, max(row[0] for row in rows) + 4, 37 if width < 8 else 80, width)
    for slot, num_tokens, num_drafts, ends in rows:
        behind = num_tokens - num_drafts + (0 if ends else 2)
        slots.computed[slot] = max(int(slots.length[slot]) - behind, 0)
    columns = torch.tensor(rows, device=device)
    return slots, (columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3])


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    # a decode row, drafts, a chunk inside a prompt, a prompt's end, padding
    mixed = [(2, 1, 0, 1), (0, 4, 3, 1), (5, 2, 1, 1), (3, 7, 0, 0), (1, 5, 0, 1), (6, 0, 0, 0), (6, 0, 0, 0)]
    for width, padding, rows in (
        (0, 0, [(1, 1, 0, 1)]),
        (3, 0, [(4, 4, 3, 1)]),
        (3, 2, mixed),
        (3, 8, [(6, 0, 0, 0), (6, 0, 0, 0)]),
        (32, 40, example_rows(generator, 2, 32)),
        (1, 3, example_rows(generator, 33, 1)),
        (7, 21, example_rows(generator, 125, 7, num_empty=3)),
    ):
        slots, (slot, num_tokens, num_drafts, ends_prompt) = example_step(generator, device, rows, width)
        example = {
            "slots": slots,
            "slot": slot,
            "num_query": sum(row[1] for row in rows) + padding,
            "num_logits": sum(row[2] + 1 for row in rows if row[3]) + padding,
            "block_size": 4,
        }
        if rows is mixed:
            yield {
                **example,
                "num_tokens": num_tokens.int(),
                "num_drafts": num_drafts.int(),
                "ends_prompt": ends_prompt.bool(),
            }
        yield {**example, "num_tokens": num_tokens, "num_drafts": num_drafts, "ends_prompt": ends_prompt}


ASSEMBLE = Op(
    name="assemble",
    reference=assemble_reference,
    examples=_examples,
    tolerance=0.0,
    why="indices",
)
