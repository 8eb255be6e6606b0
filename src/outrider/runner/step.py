"""The step program: target, processors, verifier, commit, drafter. Tensors in, tensors out.

Every runner executes this one function; they differ in how (calling it, or recording and
replaying it), never in what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.draft.base import DraftContext
from outrider.kernels.commit import COMMIT, STORE_DRAFT
from outrider.models.decoder import Decoder
from outrider.runner.drafter_guard import DrafterGuard
from outrider.tensors import Draft, Slots, StepBatch, TargetOutput, Verdict
from outrider.verify.base import ActiveProcessor, Verifier

Mark = Callable[[str], None]
"""Called with the name of a part of the step when all of its work has been given to the device."""


def unmarked(part: str) -> None:
    """Takes no note."""


class StepOutput(NamedTuple):
    """What a step computed."""

    verdict: Verdict
    draft: Draft | None  # for the rows' next step; None: the drafter was left out
    values: Mapping[str, Tensor]  # [B, K+1, width] of each column that the verifier or a processor reports


class StepProgram:
    """One speculative step, bound to its models and cache."""

    def __init__(
        self,
        model: Decoder,
        cache: Sequence[LayerCache],
        drafter: DrafterGuard,
        verifier: Verifier,
        device: torch.device,
    ) -> None:
        self._model, self._cache = model, cache
        self._guard, self._drafter, self._verifier = drafter, drafter.drafter, verifier
        self._aux_layer_ids = self._drafter.aux_layer_ids()
        self._commit, self._store_draft = COMMIT.on(device), STORE_DRAFT.on(device)

    def __call__(
        self,
        batch: StepBatch,
        draft: Draft,  # what the rows of the batch verify
        slots: Slots,  # advanced in place
        processors: Sequence[ActiveProcessor],
        drafting: bool = True,  # whether any row's request verifies drafts, ever; else the drafter is left out
        mark: Mark = unmarked,  # of "target", "verify" and "draft"
    ) -> StepOutput:
        """The verdict on `draft`, the drafts for the rows' next step, and what parts report of it."""
        hidden, features = self._model.forward(batch, self._cache, self._aux_layer_ids if drafting else ())
        num_logits = batch.logits_index.shape[0]
        sampled = hidden if num_logits == hidden.shape[0] else hidden.index_select(0, batch.logits_index)
        logits = self._model.logits(sampled)
        target = TargetOutput(logits, hidden, features)
        mark("target")
        for processor, state in processors:
            logits = processor(logits, batch, slots, state)
        verdict = self._verifier(logits, batch, draft, slots)
        values: dict[str, Tensor] = {}
        if self._verifier.columns:
            values.update(self._verifier.report(logits, batch, verdict))
        for processor, state in processors:
            processor.commit(batch, verdict, state)
            if processor.columns:
                values.update(processor.report(logits, batch, verdict))
        committed, next_token = self._commit(slots, batch, verdict)
        mark("verify")
        proposed = None
        if drafting:
            noise = self._verifier.draft_noise
            proposed = self._guard.propose(DraftContext(batch, target, committed, next_token, slots, noise))
            kept = self._store_draft(slots, batch, proposed)
            proposed = Draft(proposed.tokens, kept, proposed.logits)
        mark("draft")
        return StepOutput(verdict, proposed, values)
