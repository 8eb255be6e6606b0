"""Gathering a step's inputs from the slots.

All shapes follow from B, T and L, which the host knows, so that a step can be recorded. Rows of a
step name distinct slots. A batch may be padded with rows that have no query tokens; these may share one
slot that belongs to no request. Query tokens past the last row's are not written (cache_slot -1). Rows
of logits past the last row's are sampled, and nobody reads the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op
from outrider.tensors import Draft, PagedRows, Slots, StepBatch


def locate(start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each of `size` items, the row that owns it and its index there: [size] int64, [size] int64.

    start is [B+1] int32. Items past start[B] are given to the last row, at an index that it does not own.
    """
    item = torch.arange(size, device=start.device, dtype=start.dtype)
    row = torch.searchsorted(start[1:], item, right=True).clamp(max=start.shape[0] - 2)
    return row, (item - start[row]).long()


def _prefix_sum(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def assemble_reference(
    slots: Slots,
    plan: Tensor,  # [B, 4] int64, contiguous: slot, num_tokens, num_drafts and ends_prompt of each row
    num_query: int,  # T, at least the sum of num_tokens
    num_logits: int,  # L, at least the sum of num_drafts + 1 over rows that end their prompt
    block_size: int,
) -> StepBatch:
    """The step's batch, from the plan's rows as numbers: see `core.plan.Row`.

    Query token j of a row stands at position computed + j. Its id is the committed token there, or
    past the committed ones the slot's draft.
    """
    slot, num_tokens, num_drafts, ends_prompt = plan.unbind(1)
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
    owner, index = locate(logits_start, num_logits)
    logits_index = query_start[owner + 1].long() - owned[owner] + index
    logits_index = torch.where(index < owned[owner], logits_index, 0)
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


ASSEMBLE = Op(
    name="assemble",
    reference=assemble_reference,
    tolerance=0.0,
    why="indices",
)
