"""Sampling from the likeliest tokens alone: min_p, top_k and top_p."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from outrider.core.plan import Admission
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import MIN_P, TOP_K, TOP_P, SamplingField
from outrider.kernels.truncate import TRUNCATE
from outrider.tensors import Slots, StepBatch
from outrider.verify.base import LogitsProcessor, State, Table, Value


class Truncation(LogitsProcessor):
    """Min-p, then top-k, then top-p, in vLLM's order; greedy rows stay as they are."""

    name: ClassVar[str] = "truncation"
    fields: ClassVar[tuple[SamplingField, ...]] = (TOP_K, TOP_P, MIN_P)
    tables: ClassVar[tuple[Table, ...]] = (
        Table("top_k", torch.int32),
        Table("top_p", torch.float32, fill=1.0),
        Table("min_p", torch.float32),
    )

    def wanted(self, sampling: SamplingParams) -> bool:
        return super().wanted(sampling) and not sampling.greedy

    def admit(self, admission: Admission) -> Mapping[str, Value]:
        sampling = admission.sampling
        return {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        return TRUNCATE.on(logits.device)(
            logits, state["top_k"], state["top_p"], state["min_p"], slots.temperature, batch.logits_slot
        )
