"""The temperature of sampling."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import TEMPERATURE, SamplingField
from outrider.kernels.divide_logits import DIVIDE_LOGITS
from outrider.tensors import Slots, StepBatch
from outrider.verify.base import LogitsProcessor, State


class Temperature(LogitsProcessor):
    """Divides the logits; greedy rows stay as they are. What follows reads logits ready to be sampled from.

    The temperatures lie in the slots and not in a table of its own, since the verifier and drafters read them too.
    """

    name: ClassVar[str] = "temperature"
    fields: ClassVar[tuple[SamplingField, ...]] = (TEMPERATURE,)

    def wanted(self, sampling: SamplingParams) -> bool:
        return super().wanted(sampling) and not sampling.greedy

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        return DIVIDE_LOGITS.on(logits.device)(logits, slots.temperature, batch.logits_slot)
