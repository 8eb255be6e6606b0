"""A logits processor of one's own, with state: each time a token has come, its logit falls by a penalty.

llm = LLM(logits_processors=["no_repeat:NoRepeat"])
llm.generate(prompt, SamplingParams(extra_args={"no_repeat": 1.5}))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from outrider.processing import (
    VOCAB_SIZE,
    Admission,
    LogitsProcessor,
    SamplingField,
    Slots,
    State,
    StepBatch,
    Table,
    Value,
    Verdict,
    drafts_before,
)

PENALTY = SamplingField("no_repeat", float, 0.0, "what a token's logit loses each time it has come", high=100.0)


class NoRepeat(LogitsProcessor):
    """Counts the tokens of each request's output: OpenAI's frequency penalty."""

    name: ClassVar[str] = "no_repeat"
    fields: ClassVar[tuple[SamplingField, ...]] = (PENALTY,)
    tables: ClassVar[tuple[Table, ...]] = (
        Table("penalty", torch.float32),
        Table("counts", torch.int32, VOCAB_SIZE),
    )
    num_copies: ClassVar[int] = 2

    def admit(self, admission: Admission) -> Mapping[str, Value]:
        # Output kept across a preemption is counted again.
        kept = Counter(admission.tokens[admission.num_prompt :])
        return {"penalty": PENALTY.read(admission.sampling), "counts": kept}

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        counts = state["counts"][batch.logits_slot]  # [L, V]
        # A draft counts for the tokens after it, as if it had been accepted: they matter only if it is.
        tokens, meant = drafts_before(batch, len(logits))
        counts.scatter_add_(1, tokens, meant.int())
        return logits.sub_(state["penalty"][batch.logits_slot, None] * counts)

    def commit(self, batch: StepBatch, verdict: Verdict, state: State) -> None:
        accepted = torch.arange(verdict.tokens.shape[1], device=batch.slot.device) < verdict.count[:, None]
        slot = batch.slot[:, None].expand_as(verdict.tokens)
        state["counts"].index_put_((slot, verdict.tokens.clamp(min=0)), accepted.int(), accumulate=True)
