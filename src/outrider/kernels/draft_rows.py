"""The query rows with which a draft head follows a step of its target.

The target has run row b's query tokens; the first committed[b] of them stand, at positions s, s+1, ... The head
runs one row for each, at that same position: its token is the one AFTER the position (ids shifted left by one),
its feature the position's own. The last of them is the bonus row, whose token is the target's own newest.
Where a row is past its prompt, num_masks mask rows follow at the next positions (P-EAGLE, arXiv
2602.01469): the mask token, and no feature.

Rows at positions from `limit` on are left out. Rows of all requests are packed from the front; what is left of the
num_rows is padding, which goes nowhere. So shapes follow from T, B and num_masks alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.commit import commit_reference
from outrider.kernels.gpu.draft_rows import draft_rows_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.op import Example, Op
from outrider.kernels.step_inputs import assemble_reference, example_rows, example_step, locate
from outrider.tensors import Slots, StepBatch, Verdict

Rows = tuple[Tensor, ...]
"""query_start [B+1] int32, seq_lens [B] int32, length [B] int32; input_ids, source, positions, cache_slot, all
[num_rows] int64; logits_index, guess_slot, guess_position, all [B * num_drafts] int64.

source: the step's query token whose feature the row takes; T for a mask row. length: how many of num_drafts guesses
have a position below `limit`, 0 inside a prompt. logits_index: the rows that give the guesses, request by request,
the bonus row first, then the num_masks mask rows; indices past them repeat the last. guess_slot and guess_position:
whose guess each is, and where it would stand, the first of a request right behind its last committed token.
"""


def draft_rows_reference(
    slots: Slots,  # with this step's tokens already committed
    batch: StepBatch,  # what the target has just run
    committed: Tensor,  # [B] int32
    num_drafts: int,
    num_masks: int,  # num_drafts - 1, or 0 where drafts are made one after another
    limit: int,  # positions the head has
    mask_token: int,
    block_size: int,
) -> Rows:
    size, num_query = batch.slot.shape[0], batch.input_ids.shape[0]
    num_rows = num_query + size * num_masks
    start = batch.seq_lens - batch.query_start.diff()  # [B]
    speaks = batch.logits_start.diff() > 0
    wanted = committed + torch.where(speaks, num_masks, 0)
    count = torch.minimum(wanted, limit - start).clamp(min=0)
    query_start = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
    length = torch.where(speaks, limit - (start + committed - 1), 0).clamp(0, num_drafts).int()

    row, place = locate(query_start, num_rows)
    real = place < count[row]
    known = place < committed[row]
    positions = torch.where(real, start[row] + place, 0).long()
    following = slots.tokens[batch.slot[row], (positions + 1).clamp(max=slots.tokens.shape[1] - 1)]
    input_ids = torch.where(real, torch.where(known, following, mask_token), 0)
    feature = torch.where(known, batch.query_start[row] + place, num_query)
    source = torch.where(real, feature, 0).long()
    block = batch.block_table[row, positions // block_size].long()
    cache_slot = torch.where(real, block * block_size + positions % block_size, -1)

    guess = torch.arange(num_drafts, device=committed.device).clamp(max=num_masks)
    bonus = query_start[:-1] + committed - 1
    logits_index = (bonus[:, None] + guess).clamp(0, num_rows - 1).long().flatten()
    drafts = torch.arange(num_drafts, device=committed.device)
    guess_slot = batch.slot.repeat_interleave(num_drafts)
    guess_position = (slots.length[batch.slot].long()[:, None] + drafts).flatten()
    rows = input_ids, source, positions, cache_slot, logits_index, guess_slot, guess_position
    return query_start, (start + count).int(), length, *rows


@compiled()
def _draft_rows_kernel(
    tokens_at: int,
    committed_length_at: int,
    slot_at: int,
    query_start_at: int,
    seq_lens_at: int,
    table_at: int,
    logits_start_at: int,
    committed_at: int,
    wide_at: int,
    narrow_at: int,
    size: int,
    num_query: int,
    num_slots: int,
    max_len: int,
    max_blocks: int,
    num_drafts: int,
    num_masks: int,
    limit: int,
    mask_token: int,
    block_size: int,
) -> None:
    tokens = carray(pointer(tokens_at), (num_slots, max_len), np.int64)
    slot = carray(pointer(slot_at), (size,), np.int64)
    target_start = carray(pointer(query_start_at), (size + 1,), np.int32)
    target_lens = carray(pointer(seq_lens_at), (size,), np.int32)
    table = carray(pointer(table_at), (size, max_blocks), np.int32)
    logits_start = carray(pointer(logits_start_at), (size + 1,), np.int32)
    committed = carray(pointer(committed_at), (size,), np.int32)
    num_rows = num_query + size * num_masks
    committed_length = carray(pointer(committed_length_at), (num_slots,), np.int32)
    wide = carray(pointer(wide_at), (4 * num_rows + 3 * size * num_drafts,), np.int64)
    input_ids, source = wide[:num_rows], wide[num_rows : 2 * num_rows]
    positions, cache_slot = wide[2 * num_rows : 3 * num_rows], wide[3 * num_rows : 4 * num_rows]
    by_guess = wide[4 * num_rows :]
    logits_index, guess_slot = by_guess[: size * num_drafts], by_guess[size * num_drafts : 2 * size * num_drafts]
    guess_position = by_guess[2 * size * num_drafts :]
    narrow = carray(pointer(narrow_at), (3 * size + 1,), np.int32)
    query_start, seq_lens, length = narrow[: size + 1], narrow[size + 1 : 2 * size + 1], narrow[2 * size + 1 :]

    at = 0
    query_start[0] = 0
    for row in range(size):
        start = target_lens[row] - (target_start[row + 1] - target_start[row])
        stand = committed[row]
        speaks = logits_start[row + 1] > logits_start[row]
        bonus = at + stand - 1
        count = max(min(stand + (num_masks if speaks else 0), limit - start), 0)
        for place in range(count):
            position = start + place
            if place < stand:
                input_ids[at] = tokens[slot[row], min(position + 1, max_len - 1)]
                source[at] = target_start[row] + place
            else:
                input_ids[at] = mask_token
                source[at] = num_query
            positions[at] = position
            cache_slot[at] = np.int64(table[row, position // block_size]) * block_size + position % block_size
            at += 1
        query_start[row + 1] = at
        seq_lens[row] = start + count
        length[row] = min(max(limit - (start + stand - 1), 0), num_drafts) if speaks else 0
        for guess in range(num_drafts):
            logits_index[row * num_drafts + guess] = min(max(bonus + min(guess, num_masks), 0), num_rows - 1)
            guess_slot[row * num_drafts + guess] = slot[row]
            guess_position[row * num_drafts + guess] = committed_length[slot[row]] + guess
    for i in range(at, num_rows):
        input_ids[i], source[i], positions[i], cache_slot[i] = 0, 0, 0, -1


def draft_rows_cpu(
    slots: Slots,
    batch: StepBatch,
    committed: Tensor,
    num_drafts: int,
    num_masks: int,
    limit: int,
    mask_token: int,
    block_size: int,
) -> Rows:
    """One call that fills two buffers, of which the results are views."""
    size, num_query = batch.slot.shape[0], batch.input_ids.shape[0]
    num_rows = num_query + size * num_masks
    assert slots.tokens.is_contiguous() and batch.block_table.is_contiguous() and committed.dtype == torch.int32
    wide = torch.empty(4 * num_rows + 3 * size * num_drafts, dtype=torch.int64)
    narrow = torch.empty(3 * size + 1, dtype=torch.int32)
    _draft_rows_kernel(
        slots.tokens.data_ptr(),
        slots.length.data_ptr(),
        batch.slot.data_ptr(),
        batch.query_start.data_ptr(),
        batch.seq_lens.data_ptr(),
        batch.block_table.data_ptr(),
        batch.logits_start.data_ptr(),
        committed.data_ptr(),
        wide.data_ptr(),
        narrow.data_ptr(),
        size,
        num_query,
        slots.tokens.shape[0],
        slots.tokens.shape[1],
        batch.block_table.shape[1],
        num_drafts,
        num_masks,
        limit,
        mask_token,
        block_size,
    )
    by_row_and_guess = wide.split_with_sizes([num_rows] * 4 + [size * num_drafts] * 3)
    return *narrow.split_with_sizes([size + 1, size, size]), *by_row_and_guess


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    mixed = [(2, 1, 0, 1), (0, 4, 3, 1), (5, 3, 2, 1), (3, 7, 0, 0), (1, 5, 0, 1)]
    for rows, width, padding, num_drafts, num_masks in (
        ([(1, 1, 0, 1)], 3, 0, 3, 0),
        ([(4, 4, 3, 1)], 3, 0, 3, 2),
        (mixed, 3, 0, 4, 3),
        (example_rows(generator, 2, 32), 32, 30, 32, 31),
        (example_rows(generator, 33, 1), 1, 2, 1, 0),
        (example_rows(generator, 125, 7, num_empty=3), 7, 24, 7, 6),
    ):
        for limit in (37, 14) if len(rows) < 9 else (22,):
            slots, columns = example_step(generator, device, rows, width)
            num_query, num_logits = sum(row[1] for row in rows), sum(row[2] + 1 for row in rows if row[3])
            batch = assemble_reference(slots, *columns, num_query + padding, num_logits + padding, 4)
            part = torch.rand(len(rows), generator=generator).to(device)
            count = (columns[3] * (1 + part * (columns[2] + 1)).floor()).int()
            gained = torch.full((len(rows), width + 1), 7, device=device)
            committed, _ = commit_reference(slots, batch, Verdict(gained, count))
            yield {
                "slots": slots,
                "batch": batch,
                "committed": committed,
                "num_drafts": num_drafts,
                "num_masks": num_masks,
                "limit": limit,
                "mask_token": 9,
                "block_size": 4,
            }


DRAFT_ROWS = Op(
    name="draft_rows",
    reference=draft_rows_reference,
    kernels={"cpu": draft_rows_cpu, "cuda": draft_rows_gpu},
    examples=_examples,
    tolerance=0.0,
    why="indices",
)
