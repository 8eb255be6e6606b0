"""Gathering a step's inputs from the slots.

All shapes follow from B, T and L, which the host knows, so that a step can be recorded. Rows of a
step name distinct slots. A batch may be padded: rows with no query tokens, which may share one slot
that belongs to no request, then query tokens past the last row's (they go nowhere: cache_slot -1)
and logits rows past the last row's (drawn, and read by nobody).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.gpu.step_inputs import assemble_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.op import Example, Op
from outrider.tensors import Draft, Slots, StepBatch


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
        query_start=query_start,
        input_ids=input_ids,
        positions=positions,
        seq_lens=(computed + num_tokens).int(),
        block_table=slots.block_table[slot],
        cache_slot=cache_slot,
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


@compiled()
def _assemble_kernel(
    tokens_at: int,
    length_at: int,
    computed_at: int,
    table_at: int,
    drafts_at: int,
    slot_at: int,
    num_tokens_at: int,
    num_drafts_at: int,
    ends_prompt_at: int,
    stride: int,
    wide_at: int,
    narrow_at: int,
    num_rows: int,
    num_query: int,
    num_logits: int,
    num_slots: int,
    max_len: int,
    width: int,
    max_blocks: int,
    block_size: int,
) -> None:
    tokens = carray(pointer(tokens_at), (num_slots, max_len), np.int64)
    length = carray(pointer(length_at), (num_slots,), np.int32)
    computed = carray(pointer(computed_at), (num_slots,), np.int32)
    table = carray(pointer(table_at), (num_slots, max_blocks), np.int32)
    drafts = carray(pointer(drafts_at), (num_slots, width), np.int64)
    slots = carray(pointer(slot_at), (num_rows * stride,), np.int64)
    counts = carray(pointer(num_tokens_at), (num_rows * stride,), np.int64)
    drafted = carray(pointer(num_drafts_at), (num_rows * stride,), np.int64)
    ends = carray(pointer(ends_prompt_at), (num_rows * stride,), np.int64)
    wide = carray(pointer(wide_at), (3 * num_query + 3 * num_logits + num_rows + num_rows * width,), np.int64)
    input_ids, positions, cache_slot = wide[:num_query], wide[num_query : 2 * num_query], wide[2 * num_query :]
    by_logits = wide[3 * num_query :]
    logits_index, logits_slot = by_logits[:num_logits], by_logits[num_logits : 2 * num_logits]
    logits_position, row_slot = by_logits[2 * num_logits :], by_logits[3 * num_logits :]
    row_guesses = by_logits[3 * num_logits + num_rows :]
    narrow = carray(pointer(narrow_at), (4 * num_rows + 2 + num_rows * max_blocks,), np.int32)
    query_start, logits_start = narrow[: num_rows + 1], narrow[num_rows + 1 : 2 * num_rows + 2]
    seq_lens, row_drafts = narrow[2 * num_rows + 2 :], narrow[3 * num_rows + 2 :]
    block_table = narrow[4 * num_rows + 2 :]

    query, spoken = 0, 0
    query_start[0] = logits_start[0] = 0
    for row in range(num_rows):
        slot, num_tokens, num_drafts = slots[row * stride], counts[row * stride], drafted[row * stride]
        done = computed[slot]
        for position in range(done, done + num_tokens):
            past = position - length[slot]
            if past < 0 or width == 0:
                input_ids[query] = tokens[slot, min(position, max_len - 1)]
            else:
                input_ids[query] = drafts[slot, min(past, width - 1)]
            positions[query] = position
            block = np.int64(table[slot, position // block_size])
            cache_slot[query] = block * block_size + position % block_size
            query += 1
        if ends[row * stride]:
            for place in range(query - num_drafts - 1, query):
                logits_index[spoken] = place
                logits_slot[spoken] = slot
                logits_position[spoken] = positions[place] + 1
                spoken += 1
        query_start[row + 1], logits_start[row + 1] = query, spoken
        row_slot[row], seq_lens[row], row_drafts[row] = slot, done + num_tokens, num_drafts
        for i in range(max_blocks):
            block_table[row * max_blocks + i] = table[slot, i]
        for i in range(width):
            row_guesses[row * width + i] = drafts[slot, i]
    for i in range(query, num_query):
        input_ids[i], positions[i], cache_slot[i] = 0, 0, -1
    for i in range(spoken, num_logits):
        logits_index[i], logits_slot[i], logits_position[i] = 0, row_slot[num_rows - 1], positions[0] + 1


def assemble_cpu(
    slots: Slots,
    slot: Tensor,
    num_tokens: Tensor,
    num_drafts: Tensor,
    ends_prompt: Tensor,
    num_query: int,
    num_logits: int,
    block_size: int,
) -> StepBatch:
    """One call that fills two buffers, of which the batch's tensors are views."""
    assert slots.tokens.is_contiguous() and slots.block_table.is_contiguous() and slots.draft_tokens.is_contiguous()
    columns = slot.long(), num_tokens.long(), num_drafts.long(), ends_prompt.long()
    size, stride = slot.shape[0], slot.stride(0)
    if any(column.stride(0) != stride for column in columns):
        slot, num_tokens, num_drafts, ends_prompt = (column.contiguous() for column in columns)
        columns, stride = (slot, num_tokens, num_drafts, ends_prompt), 1
    num_slots, max_len = slots.tokens.shape
    max_blocks, width = slots.block_table.shape[1], slots.draft_tokens.shape[1]
    wide = torch.empty(3 * num_query + 3 * num_logits + size + size * width, dtype=torch.int64)
    narrow = torch.empty(4 * size + 2 + size * max_blocks, dtype=torch.int32)
    _assemble_kernel(
        slots.tokens.data_ptr(),
        slots.length.data_ptr(),
        slots.computed.data_ptr(),
        slots.block_table.data_ptr(),
        slots.draft_tokens.data_ptr(),
        columns[0].data_ptr(),
        columns[1].data_ptr(),
        columns[2].data_ptr(),
        columns[3].data_ptr(),
        stride,
        wide.data_ptr(),
        narrow.data_ptr(),
        size,
        num_query,
        num_logits,
        num_slots,
        max_len,
        width,
        max_blocks,
        block_size,
    )
    input_ids, positions, cache_slot, logits_index, logits_slot, logits_position, slot, guesses = wide.split_with_sizes(
        [num_query] * 3 + [num_logits] * 3 + [size, size * width]
    )
    query_start, logits_start, seq_lens, drafts, block_table = narrow.split_with_sizes(
        [size + 1, size + 1, size, size, size * max_blocks]
    )
    return StepBatch(
        slot=slot,
        query_start=query_start,
        input_ids=input_ids,
        positions=positions,
        seq_lens=seq_lens,
        block_table=block_table.view(size, max_blocks),
        cache_slot=cache_slot,
        num_drafts=drafts,
        draft_tokens=guesses.view(size, width),
        logits_start=logits_start,
        logits_index=logits_index,
        logits_slot=logits_slot,
        logits_position=logits_position,
    )


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
        top_k=torch.zeros(num_slots, dtype=torch.int32),
        top_p=torch.ones(num_slots),
        min_p=torch.zeros(num_slots),
        seed=torch.arange(num_slots),
        min_length=torch.zeros(num_slots, dtype=torch.int32),
        barred=torch.full((num_slots, 3), -1),
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
    kernels={"cpu": assemble_cpu, "cuda": assemble_gpu},
    examples=_examples,
    tolerance=0.0,
    why="indices",
)
