"""Verification by comparing tokens: the output is the same with speculation and without.

The target's token at a position is argmax(processed logits + Gumbel noise of (seed, position)). A draft is accepted iff
it is that token. A drafter that draws its guesses with the same noise agrees often, and the verifier need not know the
drafter's distribution: "drafter-invariant speculative decoding" (Daliri, Musco and Suresh, 2024).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from outrider.capability import Feature
from outrider.kernels.accept_drafts import ACCEPT_DRAFTS
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.tensors import Draft, Purpose, Slots, StepBatch, Verdict
from outrider.verify.base import Verifier


class Exact(Verifier):
    """A `Verifier` whose tokens are a function of (weights, prompt, sampling parameters, seed)."""

    name: ClassVar[str] = "exact"
    needs: ClassVar[frozenset[Feature]] = frozenset()
    draft_noise: ClassVar[Purpose] = Purpose.TARGET
    faithful: ClassVar[bool] = True

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        choice = GUMBEL_ARGMAX.on(logits.device)(
            logits,
            slots.temperature,
            slots.seed,
            batch.logits_position,
            Purpose.TARGET,
            slot=batch.logits_slot,
        )
        return Verdict(*ACCEPT_DRAFTS.on(logits.device)(choice, None, batch.logits_start, draft.tokens))
