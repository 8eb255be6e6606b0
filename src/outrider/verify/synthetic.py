"""Acceptance at rates that the user sets, to measure what they would be worth. The output is not the target's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from outrider.capability import Feature
from outrider.errors import OptionError
from outrider.kernels.accept_drafts import ACCEPT_DRAFTS
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.kernels.synthetic_accept import SYNTHETIC_ACCEPT
from outrider.tensors import Draft, Purpose, Slots, StepBatch, Verdict
from outrider.verify.base import Verifier


class Synthetic(Verifier):
    """A `Verifier` that accepts draft j of a round with probability synthetic_rates[j], whatever it is.

    `synthetic_rates` are unconditional, as an acceptance report gives them: the share of rounds that accept all of the
    drafts 0..j. So they may not rise. The token after the last one accepted is the target's most likely one. Drafts
    past the last rate are never accepted. Raises OptionError for rates that cannot be.
    """

    name: ClassVar[str] = "synthetic"
    needs: ClassVar[frozenset[Feature]] = frozenset()
    draft_noise: ClassVar[Purpose] = Purpose.DRAFT
    faithful: ClassVar[bool] = False

    def __init__(self, synthetic_rates: Sequence[float]) -> None:
        rates = tuple(synthetic_rates)
        if not rates or not all(0.0 <= rate <= 1.0 for rate in rates):
            raise OptionError(f"synthetic_rates must be numbers from 0 to 1, one a draft position: {list(rates)}")
        if any(after > before for before, after in pairwise(rates)):
            raise OptionError(
                f"synthetic_rates must not rise: {list(rates)}; give the share of rounds that get that far"
            )
        before = [1.0, *rates]
        chances = [rate / given if given > 0 else 0.0 for given, rate in zip(before, rates, strict=False)]
        self._chances = torch.tensor(chances, dtype=torch.float64)

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        likeliest = GUMBEL_ARGMAX.on(logits.device)
        choice = likeliest(logits, None, slots.seed, batch.logits_position, Purpose.TARGET, slot=batch.logits_slot)
        self._chances = self._chances.to(logits.device)
        accepted = SYNTHETIC_ACCEPT.on(logits.device)(
            batch.logits_start, slots.seed, batch.logits_slot, batch.logits_position, self._chances, Purpose.ACCEPT
        )
        return Verdict(*ACCEPT_DRAFTS.on(logits.device)(choice, accepted, batch.logits_start, draft.tokens))
