"""Speculative sampling: drafts are tested against probabilities, so more of them are accepted.

Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding" (2023); Chen et al.,
"Accelerating large language model decoding with speculative sampling" (2023). Let p be the target's distribution and q
the drafter's. A draft d is accepted with probability min(1, p(d) / q(d)). Where it is rejected, the token is drawn from
max(p - q, 0), normalised. The output has the distribution p. Unlike with `exact`, its tokens depend on the drafts.
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
    """A `Verifier` with the target's distribution, which accepts more drafts than comparing tokens does.

    A draft without logits counts as a point mass, q(d) = 1. That is unbiased however the draft was made, unless it was
    drawn with the noise used here. It accepts less than knowing q would, so the runner must be able to keep q.
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

        row, index = locate(batch.logits_start, logits.shape[0])
        drafted = index < batch.num_drafts[row]  # [L], False at the row after the last draft
        index = index.clamp(max=draft.tokens.shape[1] - 1)
        guess = torch.where(drafted, draft.tokens[row, index], 0)[:, None]  # [L, 1]
        target = logits.softmax(dim=-1)
        if draft.logits is None:
            likelihood = torch.ones_like(guess, dtype=torch.float64)
            residual = logits.scatter(1, guess, -torch.inf)
        else:
            guessed = draft.logits[row, index].softmax(dim=-1)
            likelihood = guessed.gather(1, guess).double()
            residual = (target - guessed).clamp(min=0).log()
        chance = uniform(NOISE_BITS.on(logits.device)(slots.seed[slot], position, Purpose.ACCEPT, 1))
        likely = target.gather(1, guess).double()
        accepted = (chance * likelihood < likely)[:, 0]

        # Rounding can leave nothing of a residual; then p equals q, and the draft is all but surely accepted.
        # Where p or q is NaN there is no residual: the draft is not accepted, and the token is drawn from p alone.
        greedy = slots.temperature[slot] == 0
        whole = greedy | ~drafted | (residual == -torch.inf).all(dim=-1) | (likelihood + likely).isnan()[:, 0]
        drawn_from = torch.where(whole[:, None], logits, residual)
        choice = sample(drawn_from, slots.temperature, slots.seed, position, Purpose.TARGET, slot=slot)
        accepted = torch.where(greedy, choice == guess[:, 0], accepted)
        return Verdict(*accept(choice, accepted, batch.logits_start, draft.tokens))
