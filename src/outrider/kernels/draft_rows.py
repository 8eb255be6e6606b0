"""The query rows with which a draft model follows a step of its target.

The target has run row b's query tokens; the first committed[b] of them are accepted, at positions s, s+1, ... The
model's row at position p holds the token at p + shift:

    shift 1    an EAGLE head: committed[b] rows, each with the feature of its own position
    shift 0    a draft model: one row more, at the position of the target's newest token, which has no feature

The last of these is the bonus row: it holds the target's newest token. Where a row is past its prompt, num_masks mask
rows follow at the next positions (P-EAGLE, arXiv 2602.01469): the mask token, and no feature.

Rows at positions from `limit` on are left out. Rows of all requests are packed from the front; what is left of the
R = T + B * (1 - shift + num_masks) rows is padding, which goes nowhere. So shapes follow from T and B alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op
from outrider.kernels.records import DraftRows
from outrider.kernels.step_inputs import locate
from outrider.tensors import PagedRows, Slots, StepBatch


def draft_rows_reference(
    slots: Slots,  # with this step's tokens already committed
    batch: StepBatch,  # what the target has just run
    committed: Tensor,  # [B] int32
    num_drafts: int,
    num_masks: int,  # num_drafts - 1, or 0 where drafts are made one after another
    limit: int,  # positions the model has
    mask_token: int,
    block_size: int,
    shift: int,  # 1 or 0
) -> DraftRows:
    target, size, num_query = batch.rows, batch.slot.shape[0], batch.input_ids.shape[0]
    num_rows = num_query + size * (1 - shift + num_masks)
    start = target.seq_lens - target.query_start.diff()  # [B]
    samples = batch.logits_start.diff() > 0
    owned = torch.where(committed > 0, committed + 1 - shift, 0)  # with tokens that are known
    wanted = owned + torch.where(samples, num_masks, 0)
    count = torch.minimum(wanted, limit - start).clamp(min=0)
    query_start = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
    length = torch.where(samples, limit - (start + owned - 1), 0).clamp(0, num_drafts).int()

    row, offset = locate(query_start, num_rows)
    real = offset < count[row]
    known = offset < owned[row]
    positions = torch.where(real, start[row] + offset, 0).long()
    token = slots.tokens[batch.slot[row], (positions + shift).clamp(max=slots.tokens.shape[1] - 1)]
    input_ids = torch.where(real, torch.where(known, token, mask_token), 0)
    feature = torch.where(offset < committed[row], target.query_start[row] + offset, num_query)
    source = torch.where(real, feature, 0).long()
    block = target.block_table[row, positions // block_size].long()
    cache_slot = torch.where(real, block * block_size + positions % block_size, -1)

    draft = torch.arange(num_drafts, device=committed.device)
    bonus = query_start[:-1] + owned - 1
    return DraftRows(
        rows=PagedRows(positions, cache_slot, target.block_table, query_start, (start + count).int()),
        length=length,
        input_ids=input_ids,
        source=source,
        logits_index=(bonus[:, None] + draft.clamp(max=num_masks)).clamp(0, num_rows - 1).long().flatten(),
        draft_slot=batch.slot.repeat_interleave(num_drafts),
        draft_position=(slots.length[batch.slot].long()[:, None] + draft).flatten(),
    )


DRAFT_ROWS = Op(
    name="draft_rows",
    reference=draft_rows_reference,
    tolerance=0.0,
    why="indices",
)
