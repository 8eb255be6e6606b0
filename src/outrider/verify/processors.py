"""Logits processors: what a request asks of the target's distribution, at every draft position.

Each maps a row of logits to its request with `batch.logits_slot`, and changes the logits in place.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from outrider.capability import Feature
from outrider.core.sampling import SamplingParams
from outrider.kernels.divide_logits import DIVIDE_LOGITS
from outrider.kernels.min_tokens_mask import MIN_TOKENS_MASK
from outrider.kernels.truncate import TRUNCATE
from outrider.tensors import Slots, StepBatch
from outrider.verify.base import LogitsProcessor


class MinTokens(LogitsProcessor):
    """Bars the tokens that would end a request from every position before its `min_length`."""

    name: ClassVar[str] = "min_tokens"
    needs: ClassVar[frozenset[Feature]] = frozenset()

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return sampling.min_tokens > 0

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots) -> Tensor:
        bar = MIN_TOKENS_MASK.on(logits.device)
        barred: Tensor = bar(logits, batch.logits_slot, batch.logits_position, slots.min_length, slots.barred)
        return barred


class Temperature(LogitsProcessor):
    """Divides the logits; greedy rows stay as they are. What follows reads logits ready to be sampled from."""

    name: ClassVar[str] = "temperature"
    needs: ClassVar[frozenset[Feature]] = frozenset()

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return sampling.temperature not in (0.0, 1.0)

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots) -> Tensor:
        divided: Tensor = DIVIDE_LOGITS.on(logits.device)(logits, slots.temperature, batch.logits_slot)
        return divided


class Truncation(LogitsProcessor):
    """Min-p, then top-k, then top-p, in vLLM's order; greedy rows stay as they are."""

    name: ClassVar[str] = "truncation"
    needs: ClassVar[frozenset[Feature]] = frozenset()

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        narrows = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        return narrows and not sampling.greedy

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots) -> Tensor:
        truncated: Tensor = TRUNCATE.on(logits.device)(
            logits, slots.top_k, slots.top_p, slots.min_p, slots.temperature, batch.logits_slot
        )
        return truncated


PROCESSORS: tuple[LogitsProcessor, ...] = (MinTokens(), Temperature(), Truncation())
"""In the order they are applied."""
