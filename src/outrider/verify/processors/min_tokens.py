"""The least length of a text: no token may end it before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from outrider.core.plan import Admission
from outrider.core.sampling import MAX_STOP_IDS
from outrider.core.sampling_fields import MIN_TOKENS, SamplingField
from outrider.kernels.min_tokens_mask import MIN_TOKENS_MASK
from outrider.tensors import Slots, StepBatch
from outrider.verify.base import LogitsProcessor, State, Table, Value


class MinTokens(LogitsProcessor):
    """Masks the tokens that would end a request at every position before its `min_length`."""

    name: ClassVar[str] = "min_tokens"
    fields: ClassVar[tuple[SamplingField, ...]] = (MIN_TOKENS,)
    tables: ClassVar[tuple[Table, ...]] = (
        Table("min_length", torch.int32),
        Table("stop_ids", torch.int64, 2 * MAX_STOP_IDS, fill=-1),
    )

    def admit(self, admission: Admission) -> Mapping[str, Value]:
        min_length = admission.num_prompt + admission.sampling.min_tokens
        return {"min_length": min_length, "stop_ids": dict(enumerate(admission.stop_ids))}

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        mask = MIN_TOKENS_MASK.on(logits.device)
        return mask(logits, batch.logits_slot, batch.logits_position, state["min_length"], state["stop_ids"])
