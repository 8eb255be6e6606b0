"""The contracts of a verifier and of a logits processor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from outrider.capability import Feature
from outrider.core.sampling import SamplingParams
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


class LogitsProcessor(_Reporter, ABC):
    """Changes the target's logits before verification, at every draft position; in place if it can."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Feature]]

    @staticmethod
    @abstractmethod
    def wanted(sampling: SamplingParams) -> bool:
        """Whether a request with these parameters needs it. A step none of whose rows want it skips it."""

    @abstractmethod
    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots) -> Tensor:
        """[L, V] float32 in and out. Rows of requests that do not want it must come out unchanged."""
