"""Multi-token prediction as a user's file: its modules' weights lie in the target's own checkpoint.

It shows that the door is open: names in the target's checkpoint that are the drafter's, and several cache layouts, of
different head sizes. A module keeps what it made of each token in a cache of its own and reads it back from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outrider.drafting import (
    CacheLayout,
    CheckpointError,
    Draft,
    DraftContext,
    Drafter,
    DraftOptions,
    Feature,
    Footprint,
    LayerCache,
    TargetFacts,
    TargetParts,
)


class Mtp(Drafter):
    """One module a draft: hidden' = eh_proj([embedding ; hidden])."""

    name: ClassVar[str] = "mtp"
    needs: ClassVar[frozenset[Feature]] = frozenset({Feature.DRAFT_CACHE, Feature.HOST_CODE})  # shapes depend on data
    rerun: ClassVar[int] = 1

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        super().__init__(options, target)
        held = {} if target.checkpoint is None else target.checkpoint.tensors
        self.names = [f"model.layers.{target.num_layers + index}.eh_proj.weight" for index in range(self.num_drafts)]
        missing = [name for name in self.names if name not in held]
        if missing:
            raise CheckpointError(f"method mtp needs {missing[0]}, which the target's checkpoint does not hold")

    @classmethod
    def reads_from_target(cls, name: str, target: TargetFacts) -> bool:
        return name.endswith(".eh_proj.weight")

    @classmethod
    def footprint(cls, options: DraftOptions, target: TargetFacts) -> Footprint:
        size = 2 * target.hidden_size**2 * 4
        return Footprint(options.num_speculative_tokens * size, super().footprint(options, target).per_block)

    def cache_layouts(self) -> Sequence[CacheLayout]:
        size, block = self.target.hidden_size, self.target.sizes.block_size
        return [CacheLayout(1, heads, size // heads, block, torch.float32) for heads in range(1, 1 + self.num_drafts)]

    def prepare(
        self,
        target: TargetParts,
        caches: Sequence[Sequence[LayerCache]],
        dummy_seed: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        assert self.target.checkpoint is not None
        self._parts = target
        self.caches = [layer for (layer,) in caches]
        self._projections = [self.target.checkpoint.read(name).float() for name in self.names]

    def propose(self, context: DraftContext) -> Draft:
        batch, size = context.batch, self.target.sizes.block_size
        last = batch.rows.query_start[:-1] + context.committed - 1
        position = batch.rows.positions[last]
        block = batch.rows.block_table.gather(1, (position // size)[:, None])[:, 0].long()
        written = batch.rows.cache_slot >= 0
        there = batch.rows.cache_slot[written]
        hidden: Tensor = context.target.hidden
        tokens = [context.next_token]
        for cache, projection in zip(self.caches, self._projections, strict=True):
            _, heads, _, width = cache.key.shape
            cache.key[there // size, :, there % size] = hidden.view(-1, heads, width)[written].float()
            stream = cache.key[block, :, position % size].flatten(1)
            stream = torch.cat([self._parts.embedding(tokens[-1]), stream], dim=-1) @ projection.T
            tokens.append(self._parts.head(stream).argmax(-1))
            hidden = hidden.index_put((last,), stream)
        samples = batch.logits_start[1:] > batch.logits_start[:-1]
        return Draft(torch.stack(tokens[1:], dim=1), samples.int() * self.num_drafts, None)
