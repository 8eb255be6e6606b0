"""EAGLE-3: a small network ahead of the target, fed with its hidden states and then with its own (arXiv 2503.01840).

    position        p     p+1 ... p+a   p+a+1    p+a+2
    token           t     t   ... b     d1       d2        one further on than the position
    hidden state    f_p   f   ... f_p+a h        h'        the target's features, then the network's output
    guess                         d1    d2       d3        K - 1 further passes of one row a request

Rows up to p+a are of tokens that the target has just run and committed. They overwrite what the last round left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from outrider.draft.base import AcceptancePattern, DraftContext, Drafter
from outrider.draft.eagle.base import HeadDrafter, HeadRows
from outrider.draft.eagle.peagle import PEagle
from outrider.kernels.single_rows import SINGLE_ROWS
from outrider.tensors import Draft, PagedRows, StepBatch


class Eagle3(HeadDrafter):
    """K drafts in K passes."""

    name: ClassVar[str] = "eagle3"
    parallel: ClassVar[bool] = False
    wants: ClassVar[str | None] = "fc.weight and layers.0.hidden_norm.weight (or midlayer.*), and no mask_hidden"
    manner: ClassVar[str] = "one after another"

    @classmethod
    def also_means(cls, other: type[Drafter], given: Mapping[str, Any]) -> bool:
        """vLLM calls a P-EAGLE head method "eagle3" with parallel_drafting true."""
        return issubclass(other, PEagle) and given.get("parallel_drafting") is True

    @classmethod
    def diagnose(cls, pattern: AcceptancePattern) -> str | None:
        if pattern.first == 2 and pattern.collapsed:
            return "what is handed from one pass to the next is not the last pass's (hidden state, token, keys)"
        return super().diagnose(pattern)

    def propose(self, context: DraftContext) -> Draft:
        batch, network = context.batch, self.network
        rows = self.rows(context, num_masks=0)
        hidden = self.hidden(context, rows)
        normed, hidden = network(rows.batch.input_ids, hidden, rows.batch, self._cache)
        bonus, positions, singles = self._singles(context, rows)
        normed, hidden = self._gather(normed, None, bonus), self._gather(hidden, None, bonus)
        token, logits = self.guess(normed, context, batch.slot, positions[0])
        tokens, draft_logits = [token], [logits]
        for single, position in zip(singles, positions[1:], strict=True):
            normed, hidden = network(token, hidden, single, self._cache)
            token, logits = self.guess(normed, context, batch.slot, position)
            tokens.append(token)
            draft_logits.append(logits)
        kept = [logits for logits in draft_logits if logits is not None]
        return Draft(torch.stack(tokens, dim=1), rows.length, torch.stack(kept, dim=1) if kept else None)

    def _singles(self, context: DraftContext, rows: HeadRows) -> tuple[Tensor, Sequence[Tensor], list[StepBatch]]:
        """The first pass's rows that give drafts [B], the drafts' positions [B] in each pass, and further batches."""
        batch = context.batch
        query_start, bonus, guessed, *by_pass = SINGLE_ROWS.on(batch.slot.device)(
            rows.guesses,
            rows.position,
            rows.length,
            batch.rows.block_table,
            self.num_drafts,
            self.target.sizes.block_size,
        )
        singles = [
            replace(batch, rows=PagedRows(positions, cache_slot, batch.rows.block_table, query_start, seq_lens))
            for seq_lens, positions, cache_slot in zip(*by_pass, strict=True)
        ]
        return bonus, guessed.unbind(), singles
