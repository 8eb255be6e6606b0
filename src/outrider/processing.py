"""What authors of logits processors import: a processor is one class, named as `module:Class`."""

from __future__ import annotations

from outrider.core.plan import Admission
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import SamplingField
from outrider.tensors import Column, Slots, StepBatch, Verdict
from outrider.verify.base import VOCAB_SIZE, LogitsProcessor, State, Table, Value, drafts_before

__all__ = [
    "VOCAB_SIZE",
    "Admission",
    "Column",
    "LogitsProcessor",
    "SamplingField",
    "SamplingParams",
    "Slots",
    "State",
    "StepBatch",
    "Table",
    "Value",
    "Verdict",
    "drafts_before",
]
