"""P-EAGLE run wrongly, in the ways that are known to happen: each must make `outrider accept` fail.

All are called as the right one is, so that their setting is its setting and only acceptance can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.draft.base import DraftContext, TargetParts
from outrider.draft.eagle3 import Eagle3
from outrider.draft.head import Rows
from outrider.draft.peagle import PEagle
from outrider.tensors import Draft


class Healthy(PEagle):
    """Run as it should be: what shows that the others fail for their fault, and not for being plugged in."""


class Sequential(PEagle):
    """Run one token at a time, as if it were EAGLE-3: each pass is fed the last one's guess and output."""

    propose = Eagle3.propose
    _singles = Eagle3._singles


class ShiftedTaps(PEagle):
    """Reads the streams that enter the layers after those it was trained on."""

    def feature_layers(self) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in super().feature_layers())


class BlindMasks(PEagle):
    """Mask rows see the rows of their own pass and nothing of the cached context."""

    def prepare(
        self,
        target: TargetParts,
        cache: Sequence[LayerCache],
        dummy_seed: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        super().prepare(target, cache, dummy_seed, progress)
        self._empty = [LayerCache(*(torch.zeros_like(half) for half in layer)) for layer in cache]

    def propose(self, context: DraftContext) -> Draft:
        seen = super().propose(context)
        cache, start = self._cache, self._first_row(context)
        self._cache, self._start = self._empty, start
        try:
            blind = super().propose(context)
        finally:
            self._cache, self._start = cache, None
        return replace(seen, tokens=torch.cat((seen.tokens[:, :1], blind.tokens[:, 1:]), dim=1))

    _start: Tensor | None = None  # [B] where each row's pass begins, while it is run blindly

    def _first_row(self, context: DraftContext) -> Tensor:
        rows = super().rows(context, self.num_drafts - 1).batch
        return rows.seq_lens - rows.query_start.diff()

    def rows(self, context: DraftContext, num_masks: int) -> Rows:
        """Of a blind pass: moved to where the sequence begins, since only the distance of two positions counts."""
        rows = super().rows(context, num_masks)
        if self._start is None:
            return rows
        batch, size = rows.batch, self.target.block_size
        count = batch.query_start.diff().long()
        row = torch.repeat_interleave(torch.arange(len(count)), count)
        positions, cache_slot = batch.positions.clone(), batch.cache_slot.clone()
        positions[: len(row)] -= self._start.long()[row]
        block = batch.block_table[row, positions[: len(row)] // size].long()
        cache_slot[: len(row)] = block * size + positions[: len(row)] % size
        return replace(rows, batch=replace(batch, positions=positions, cache_slot=cache_slot, seq_lens=count.int()))


class StaleFeatures(PEagle):
    """Mask rows hold the target's features of the drafts just rejected, where there are any."""

    def rows(self, context: DraftContext, num_masks: int) -> Rows:
        rows, step = super().rows(context, num_masks), context.batch
        places = rows.guesses.view(-1, self.num_drafts)
        bonus, masks = places[:, :1], places[:, 1:]
        stale = rows.source[bonus] + torch.arange(1, self.num_drafts)
        rejected = stale < step.query_start[1:, None]
        source = rows.source.clone()
        source[masks] = torch.where(rejected & (rows.length[:, None] > 0), stale, source[masks])
        return replace(rows, source=source)


class NoRerun(PEagle):
    """Takes what is cached for a prefix as it is, though its last row was made for another next token."""

    rerun: ClassVar[int] = 0
