"""EAGLE-3: a small network ahead of the target, fed with its hidden states and then with its own (arXiv 2503.01840).

    position        p     p+1 ... p+a   p+a+1    p+a+2
    token           t     t   ... b     d1       d2        one further on than the position
    hidden state    f_p   f   ... f_p+a h        h'        the target's features, then the network's output
    guess                         d1    d2       d3        K - 1 further passes of one row a request

The rows up to p+a are those the target has just run and kept; they rewrite what the last round's guesses left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from outrider.draft.base import DraftContext
from outrider.draft.head import HeadDrafter, Rows
from outrider.tensors import Draft, StepBatch


class Eagle3(HeadDrafter):
    """K drafts in K passes."""

    name: ClassVar[str] = "eagle3"
    parallel: ClassVar[bool] = False

    def propose(self, context: DraftContext) -> Draft:
        batch, network = context.batch, self.network
        rows = self.rows(context, num_masks=0)
        hidden = self.hidden(context, rows)
        normed, hidden = network(rows.batch.input_ids, hidden, rows.batch, self._cache)
        bonus = rows.guesses.view(-1, self.num_drafts)[:, 0]
        normed, hidden = normed.index_select(0, bonus), hidden.index_select(0, bonus)
        position = rows.position.view(-1, self.num_drafts)[:, 0].contiguous()  # of the first guess
        token, law = self.guess(normed, context, batch.slot, position)
        tokens, laws = [token], [law]
        for step, single in enumerate(self._singles(context, rows, position), start=1):
            normed, hidden = network(token, hidden, single, self._cache)
            token, law = self.guess(normed, context, batch.slot, position + step)
            tokens.append(token)
            laws.append(law)
        kept = [law for law in laws if law is not None]
        return Draft(torch.stack(tokens, dim=1), rows.length, torch.stack(kept, dim=1) if kept else None)

    def _singles(self, context: DraftContext, rows: Rows, position: Tensor) -> list[StepBatch]:
        """The batch of each further pass: a row a request, behind the one before; at 0, unwritten, if none is left."""
        batch, size = context.batch, self.target.block_size
        step = torch.arange(1, self.num_drafts, device=position.device)[:, None]
        own = position - 2 + step  # [K-1, B]; the bonus row stands two before the first guess
        active = step < rows.length
        own = torch.where(active, own, 0)
        block = batch.block_table.gather(1, (own // size).T).T.long()
        cache_slot = torch.where(active, block * size + own % size, -1)
        seq_lens = (own + 1).int()
        query_start = torch.arange(batch.slot.shape[0] + 1, dtype=torch.int32, device=position.device)
        return [
            replace(batch, query_start=query_start, seq_lens=lens, positions=places, cache_slot=slots)
            for lens, places, slots in zip(seq_lens, own, cache_slot, strict=True)
        ]
