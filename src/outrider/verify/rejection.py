"""Speculative sampling: drafts are tested against probabilities, so more of them stand.

Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding" (2023);
Chen et al., "Accelerating large language model decoding with speculative sampling" (2023). With p
the target's law and q the drafter's, a draft d stands with probability min(1, p(d) / q(d)); where it
falls, the token is drawn from max(p - q, 0), normalised. The output has the law p, but, unlike
`exact`, which tokens come out depends on the drafts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from outrider.capability import Feature
from outrider.kernels.accept_drafts import ACCEPT_DRAFTS
from outrider.kernels.noise import NOISE_BITS, uniform
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.kernels.step_inputs import locate
from outrider.tensors import Draft, Purpose, Slots, StepBatch, Verdict
from outrider.verify.base import Verifier


class Rejection(Verifier):
    """A `Verifier` with the target's law, and more drafts accepted than by comparing tokens.

    A draft without logits is a point mass, q(d) = 1. That is exact however the guess was made, as
    long as not with the noise used here; it only accepts less than knowing q would. So that q is
    never lost in silence the runner must be able to keep it.
    """

    name: ClassVar[str] = "rejection"
    needs: ClassVar[frozenset[Feature]] = frozenset({Feature.DRAFT_LOGITS})
    draft_noise: ClassVar[Purpose] = Purpose.DRAFT
    faithful: ClassVar[bool] = True

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        slot, position = batch.logits_slot, batch.logits_position
        sample, accept = GUMBEL_ARGMAX.on(logits.device), ACCEPT_DRAFTS.on(logits.device)
        if draft.tokens.shape[1] == 0:
            choice = sample(logits, slots.temperature, slots.seed, position, Purpose.TARGET, slot=slot)
            return Verdict(*accept(choice, None, batch.logits_start, draft.tokens))

        row, place = locate(batch.logits_start, logits.shape[0])
        drafted = place < batch.num_drafts[row]  # [L], False at the row after the last draft
        place = place.clamp(max=draft.tokens.shape[1] - 1)
        guess = torch.where(drafted, draft.tokens[row, place], 0)[:, None]  # [L, 1]
        target = logits.softmax(dim=-1)
        if draft.logits is None:
            likelihood = torch.ones_like(guess, dtype=torch.float64)
            residual = logits.scatter(1, guess, -torch.inf)
        else:
            guessed = draft.logits[row, place].softmax(dim=-1)
            likelihood = guessed.gather(1, guess).double()
            residual = (target - guessed).clamp(min=0).log()
        chance = uniform(NOISE_BITS.on(logits.device)(slots.seed[slot], position, Purpose.ACCEPT, 1))
        stands = (chance * likelihood < target.gather(1, guess).double())[:, 0]

        # Rounding can leave nothing of a residual; then p equals q and the draft all but surely stands.
        greedy = slots.temperature[slot] == 0
        whole = greedy | ~drafted | (residual == -torch.inf).all(dim=-1)
        law = torch.where(whole[:, None], logits, residual)
        choice = sample(law, slots.temperature, slots.seed, position, Purpose.TARGET, slot=slot)
        stands = torch.where(greedy, choice == guess[:, 0], stands)
        return Verdict(*accept(choice, stands, batch.logits_start, draft.tokens))
