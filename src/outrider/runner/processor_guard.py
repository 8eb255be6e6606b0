"""Keeps what goes wrong in a user's logits processor to the requests that want it: they end with an error."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from outrider.core.plan import Admission
from outrider.core.plugin import is_of_user
from outrider.core.sampling import SamplingParams
from outrider.errors import OptionError
from outrider.tensors import Slots, StepBatch, Verdict
from outrider.verify.base import LogitsProcessor, State, Table, Value

logger = logging.getLogger("outrider")

FAILED = "guard.failed"
"""A table: NaN in the slots of requests for which the processor failed, else 0. A logit that is NaN ends a request."""


class GuardedProcessor(LogitsProcessor):
    """A processor that is not of this package. While the runner is built, errors go through."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self._processor = processor
        for fact in ("name", "needs", "fields", "columns", "num_copies"):
            setattr(self, fact, getattr(processor, fact))
        self.tables = (*processor.tables, Table(FAILED, torch.float32))  # type: ignore[misc]
        self._slots: set[int] = set()  # of requests that want it
        self._serving = self._has_failed = False

    def serve(self) -> None:
        """The runner is built: from now on nothing that the processor raises goes through."""
        self._serving = True

    def wanted(self, sampling: SamplingParams) -> bool:
        try:
            return self._processor.wanted(sampling)
        except Exception as error:
            self._take("wanted", error)
            return True

    def admit(self, admission: Admission) -> Mapping[str, Value]:
        self._slots.add(admission.slot)
        try:
            return self._processor.admit(admission)
        except Exception as error:
            return self.not_admitted(error)

    def not_admitted(self, error: Exception) -> Mapping[str, Value]:
        """What the tables hold of a request for which `admit` failed, or gave what no table can hold."""
        self._take("admit", error)
        return {FAILED: math.nan}

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        try:
            changed = self._processor(logits, batch, slots, state)
            _check("it must return", changed, logits.shape, logits.dtype, logits.device)
            changed = changed.contiguous()  # rows that share memory could not be changed apart
        except Exception as error:
            self._take("__call__", error)
            self._fail(state)
            changed = logits
        changed[:, 0] += state[FAILED].index_select(0, batch.logits_slot)
        return changed

    def commit(self, batch: StepBatch, verdict: Verdict, state: State) -> None:
        try:
            self._processor.commit(batch, verdict, state)
        except Exception as error:
            self._take("commit", error)
            self._fail(state)

    def report(self, logits: Tensor, batch: StepBatch, verdict: Verdict) -> Mapping[str, Tensor]:
        try:
            values = self._processor.report(logits, batch, verdict)
            for column in self.columns:
                shape = (*verdict.tokens.shape, column.width)
                found = values[column.name]
                _check(f"column {column.name} of its report must be", found, shape, column.dtype, logits.device)
            return values
        except Exception as error:
            self._take("report", error)
            return {}

    def release(self, slot: int) -> None:
        self._slots.discard(slot)
        try:
            self._processor.release(slot)
        except Exception as error:
            self._take("release", error)

    def _fail(self, state: State) -> None:
        """From now on the requests that want it have no token to draw."""
        failed = state[FAILED]
        failed.index_fill_(0, torch.tensor(sorted(self._slots), dtype=torch.int64, device=failed.device), math.nan)

    def _take(self, method: str, error: Exception) -> None:
        """Takes note of what the processor raised, or raises it again while the runner is built."""
        if not self._serving:
            raise error
        logger.log(
            logging.DEBUG if self._has_failed else logging.WARNING,
            "logits processor %s failed in %s: %s: %s; requests that want it end with an error, and others go on",
            self.name,
            method,
            type(error).__name__,
            error,
            exc_info=error,
        )
        self._has_failed = True


def _check(what: str, found: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """OptionError unless it is such a tensor."""
    said: object = type(found).__name__
    if isinstance(found, Tensor):
        if (tuple(found.shape), found.dtype, found.device) == (tuple(shape), dtype, device):
            return
        said = f"{found.dtype} {list(found.shape)} on {found.device}"
    raise OptionError(f"{what} {dtype} {list(shape)} on {device}: {said}")


def guarded(processors: Sequence[LogitsProcessor]) -> tuple[LogitsProcessor, ...]:
    """The processors, each that is not of this package in a guard."""
    return tuple(GuardedProcessor(one) if is_of_user(one) else one for one in processors)
