"""An EAGLE-1 head (Li et al., 2024) as a user's file: finds its own checkpoints, and drafts from the last hidden state.

It shows that the door is open to another format. The head's decoder layer is left out, so it only reads `fc`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from outrider.drafting import (
    Checkpoint,
    Draft,
    DraftContext,
    Drafter,
    DraftOptions,
    Feature,
    Footprint,
    LayerCache,
    Match,
    Mismatch,
    TargetFacts,
    TargetParts,
    TensorSlot,
    load_weights,
    option,
)


@dataclass(frozen=True, slots=True)
class Eagle1Options(DraftOptions):
    """Where the head is."""

    model: str | None = option(None, "the draft head: a local directory or a Hugging Face id", compare=False)


class Eagle1(Drafter):
    """K passes of fc([embedding ; hidden]), each fed with the last pass's output."""

    name: ClassVar[str] = "eagle1"
    needs: ClassVar[frozenset[Feature]] = frozenset()
    Options: ClassVar[type[DraftOptions]] = Eagle1Options
    wants: ClassVar[str | None] = "fc.weight [H, 2H], and no layers.0.hidden_norm.weight"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> Match | Mismatch | None:
        fc = checkpoint.tensors.get("fc.weight")
        newer = "layers.0.hidden_norm.weight" in checkpoint.tensors or "draft_vocab_size" in checkpoint.config
        if fc is None or newer:
            return None
        size = checkpoint.config["hidden_size"]
        if fc.shape != (size, 2 * size):
            return Mismatch(f"fc.weight of {checkpoint.directory} has shape {fc.shape}, not {(size, 2 * size)}")
        return Match("EAGLE-1 head", {"num_speculative_tokens": 2}, size)

    @classmethod
    def footprint(cls, options: DraftOptions, target: TargetFacts) -> Footprint:
        return Footprint(weights=2 * target.hidden_size**2 * 4)

    @classmethod
    def describe(cls, options: DraftOptions, target: TargetFacts) -> Mapping[str, Any]:
        return {"hidden_size": options.description}

    def prepare(
        self,
        target: TargetParts,
        caches: Sequence[Sequence[LayerCache]],
        dummy_seed: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        size, checkpoint = self.target.hidden_size, self.options.checkpoint
        assert checkpoint is not None and not caches
        self._parts = target
        self._fc = torch.full((size, 2 * size), torch.nan, device=self.target.device)
        load_weights(
            checkpoint.directory,
            {"fc.weight": TensorSlot(self._fc)},
            ignores=lambda name: name.startswith(("layers.0.", "embed_tokens.")),
            progress=progress,
            pickled=True,
        )

    def propose(self, context: DraftContext) -> Draft:
        batch, tokens = context.batch, [context.next_token]
        last = (batch.rows.query_start[:-1] + context.committed - 1).clamp(min=0)
        hidden: Tensor = context.target.hidden[last]
        for _ in range(self.num_drafts):
            hidden = torch.cat([self._parts.embedding(tokens[-1]), hidden], dim=-1) @ self._fc.T
            tokens.append(self._parts.head(hidden).argmax(-1))
        samples = batch.logits_start[1:] > batch.logits_start[:-1]
        return Draft(torch.stack(tokens[1:], dim=1), samples.int() * self.num_drafts, None)
