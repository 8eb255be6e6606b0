"""P-EAGLE: the network of EAGLE-3, trained to give all K drafts in one pass (arXiv 2602.01469).

    position        p     p+1 ... p+a   p+a+1    p+a+2
    token           t     t   ... b     mask     mask      one further on than the position, where it is known
    hidden state    f_p   f   ... f_p+a m        m         the target's features; m is learned, and projected like them
    guess                         d1    d2       d3

Attention is plain causal: a mask row sees the context, the bonus row and the mask rows before it, keys of earlier
rounds included. What mask rows leave in the cache lies past the committed length, where the next round overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.draft.base import (
    BUNDLED_MODEL,
    AcceptancePattern,
    DraftContext,
    DraftOptions,
    TargetFacts,
    TargetParts,
)
from outrider.draft.eagle.base import HeadDrafter
from outrider.tensors import Draft

ALL_BUT_GONE = 0.05
"""A share of a ratio under which none of the drafts after it are accepted but by luck."""


class PEagle(HeadDrafter):
    """K drafts in one pass."""

    name: ClassVar[str] = "peagle"
    parallel: ClassVar[bool] = True
    default_for: ClassVar[str | None] = BUNDLED_MODEL
    wants: ClassVar[str | None] = (
        "fc.weight, layers.0.hidden_norm.weight (or midlayer.*), mask_hidden and a mask token id in config.json"
    )
    manner: ClassVar[str] = "all in one pass"

    @classmethod
    def diagnose(cls, pattern: AcceptancePattern) -> str | None:
        if pattern.first != 2:
            return super().diagnose(pattern)
        if not pattern.collapsed:
            return "mask rows see something stale (features of rejected tokens, or an earlier round's keys)"
        run_alone = "the parallel head is run one token at a time"
        misled = "mask rows do not see the context, or hold stale features of rejected tokens"
        likelier, other = (run_alone, misled) if pattern.share < ALL_BUT_GONE else (misled, run_alone)
        return f"{likelier}; else {other}"

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        super().__init__(options, target)
        self._mask_row: Tensor | None = None  # [1, H]

    def prepare(
        self,
        target: TargetParts,
        caches: Sequence[Sequence[LayerCache]],
        dummy_seed: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        super().prepare(target, caches, dummy_seed, progress)
        self._mask_row = self.network.mask_row()

    def propose(self, context: DraftContext) -> Draft:
        assert self._mask_row is not None, "the head was not given its weights"
        rows = self.rows(context, num_masks=self.num_drafts - 1)
        hidden = self.hidden(context, rows, self._mask_row)
        normed, _ = self.network(rows.batch.input_ids, hidden, rows.batch, self._cache)
        tokens, logits = self.guess(self._gather(normed, None, rows.guesses), context, rows.slot, rows.position)
        shape = (len(rows.length), self.num_drafts)
        return Draft(tokens.view(shape), rows.length, None if logits is None else logits.view(*shape, -1))
