"""The contracts of a verifier and of a logits processor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from outrider.capability import Feature
from outrider.core.plan import Admission
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import SamplingField
from outrider.kernels.step_inputs import locate
from outrider.tensors import Column, Draft, Purpose, Slots, StepBatch, Verdict


class _Reporter:
    """A part that may report values of each token beside the token itself."""

    columns: ClassVar[tuple[Column, ...]] = ()
    """What `report` gives; names are unique among all parts of a configuration."""

    def report(self, logits: Tensor, batch: StepBatch, verdict: Verdict) -> Mapping[str, Tensor]:
        """[B, K+1, width] of each of `columns`, by name: values of the tokens that the verdict gives each row.

        `logits` [L, V] are those that the verifier read. What lies past a row's count is not read.
        """
        return {}


class Verifier(_Reporter, ABC):
    """Decides which drafts are accepted, so that the output has the target's own distribution."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Feature]]
    draft_noise: ClassVar[Purpose]  # TARGET if it compares tokens, DRAFT if it compares probabilities
    faithful: ClassVar[bool]  # False: the text is not the target's; for benchmarks, and every output says so

    @abstractmethod
    def __call__(
        self,
        logits: Tensor,  # [L, V] float32, the target's, with every logits processor applied
        batch: StepBatch,
        draft: Draft,  # aligned with the batch's rows
        slots: Slots,
    ) -> Verdict:
        """Compare each row's drafts with the target and add one token of the target's own.

        Randomness is a function of (seed, position, purpose) alone, never of the batch or the
        runner, so the same request gives the same tokens wherever and with whomever it runs.
        """


VOCAB_SIZE = -1
"""As the width of a table: one value for each token of the vocabulary."""

State = Mapping[str, Tensor]
"""A processor's tables by name, each [S] or [S, width], with a row for every slot."""

Value = int | float | Sequence[int] | Mapping[int, float]
"""What a table holds of one request: a value, all values of a row, or those at some indices, the others at `fill`."""


class Table(NamedTuple):
    """What a processor keeps on the device for each slot."""

    name: str
    dtype: torch.dtype
    width: int | None = None  # values a slot; None: one, and the table is [S]
    fill: float = 0  # what asks for nothing: every row holds it whose request does not want the processor

    def shape(self, num_slots: int, vocab_size: int) -> tuple[int, ...]:
        """The table's shape, for so many slots."""
        if self.width is None:
            return (num_slots,)
        return (num_slots, vocab_size if self.width == VOCAB_SIZE else self.width)


class LogitsProcessor(_Reporter, ABC):
    """Changes the target's logits before verification, at every draft position, and owns the state that takes.

    One file has all of it: the request's fields that it reads, its tables on the device, and what it does. A step
    none of whose rows want it leaves it out. It may not read a tensor on the host, nor make a shape depend on one,
    unless HOST_CODE is in `needs`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Feature]] = frozenset()
    fields: ClassVar[tuple[SamplingField, ...]] = ()
    tables: ClassVar[tuple[Table, ...]] = ()
    num_copies: ClassVar[int] = 0
    """Tensors of the logits' size that `__call__` makes, for the memory plan."""

    def wanted(self, sampling: SamplingParams) -> bool:
        """Whether a request with these parameters needs it."""
        return any(field.asked(sampling) for field in self.fields)

    def admit(self, admission: Admission) -> Mapping[str, Value]:
        """What its tables hold for a request that wants it and takes a slot; a table left out gets its `fill`.

        A preempted request is released and admitted again: `admission.tokens` then hold the output that it kept.
        """
        return {}

    @abstractmethod
    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        """[L, V] float32 in and out, in place if it can. Rows that do not want it must come out unchanged.

        Row l predicts the token at batch.logits_position[l] of the request in batch.logits_slot[l]. The drafts before
        that token are no part of `state` yet: see `drafts_before`.
        """

    def commit(self, batch: StepBatch, verdict: Verdict, state: State) -> None:
        """The verdict's tokens are now part of their requests: the only ones that `state` may ever count."""

    def release(self, slot: int) -> None:
        """The request in `slot` is gone. Its rows of the tables need no care."""


class ActiveProcessor(NamedTuple):
    """A processor with its state."""

    processor: LogitsProcessor
    state: State


def drafts_before(batch: StepBatch, num_logits: int) -> tuple[Tensor, Tensor]:
    """The drafts that each row of logits takes as accepted: tokens [L, K] int64, and which are meant [L, K] bool."""
    row, index = locate(batch.logits_start, num_logits)
    tokens = batch.draft_tokens.index_select(0, row)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < index[:, None]
