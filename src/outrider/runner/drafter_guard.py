"""Keeps what goes wrong in a drafter away from requests: its drafts are dropped, and after some failures it is too."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from outrider.capability import Feature
from outrider.core.plan import DrafterFaults, StepResult
from outrider.core.plugin import is_of_user
from outrider.draft.base import DraftContext, Drafter
from outrider.errors import OptionError, OutriderError
from outrider.tensors import Draft, StepBatch
from outrider.verify.base import Verifier

logger = logging.getLogger("outrider")

MAX_FAILURES = 3
"""After so many failures a drafter is asked no more."""


class DrafterGuard:
    """Calls a drafter. Once requests are served, what it raises costs the drafts of that step, and nothing else.

    Drafts of a class that is not of this package are checked: their shapes and types, and on the device their values.
    While the runner is built, errors go through.
    """

    def __init__(self, drafter: Drafter, verifier: Verifier) -> None:
        self.drafter = drafter
        self.keeps_logits = drafter.gives_logits and Feature.DRAFT_LOGITS in verifier.needs
        """Whether the slots keep the distributions that drafts were drawn from."""
        self.num_wrong: Tensor | None = None
        """[1] int64 on the device: rows with wrong values so far, for `note`. None: values are not checked."""
        self.stopped = False
        self._serving = False
        self._num_failures = self._num_noted = 0
        device, vocab_size = drafter.target.device, drafter.target.vocab_size
        if is_of_user(drafter):
            self.num_wrong = torch.zeros(1, dtype=torch.int64, device=device)
        self._column = torch.arange(drafter.num_drafts, device=device)
        # Where drafts are dropped, token 0 is said to be certain: a later step may verify it all the same.
        self._certain = torch.full((vocab_size if self.keeps_logits else 0,), -torch.inf, device=device)
        self._certain[:1] = 0.0

    def serve(self) -> None:
        """The runner is built: from now on nothing that the drafter raises goes through."""
        self._serving = True
        if self.num_wrong is not None:
            self.num_wrong.zero_()

    def propose(self, context: DraftContext) -> Draft:
        """As `Drafter.propose`; no drafts where that fails, or has failed too often."""
        size = context.batch.slot.shape[0]
        if self.stopped:
            return self._no_drafts(size)
        try:
            draft = self.drafter.propose(context)
            return draft if self.num_wrong is None else self._checked(draft, context.batch, self.num_wrong)
        except Exception as error:
            self._take("propose", error)
            return self._no_drafts(size)

    def admit(self, slot: int, tokens: Sequence[int]) -> None:
        """As `Drafter.admit`."""
        if not self.stopped:
            try:
                self.drafter.admit(slot, tokens)
            except Exception as error:
                self._take("admit", error)

    def release(self, slot: int) -> None:
        """As `Drafter.release`."""
        if not self.stopped:
            try:
                self.drafter.release(slot)
            except Exception as error:
                self._take("release", error)

    def note(self, result: StepResult, num_wrong: Tensor | None) -> StepResult:
        """The step's result with what went wrong so far. `num_wrong`: a copy on the host, as the step left it."""
        if num_wrong is not None and (count := int(num_wrong)) > self._num_noted:
            self._num_noted = count
            said = f"a token outside the vocabulary of {self.drafter.target.vocab_size}, a length outside 0 to "
            said += f"{self.drafter.num_drafts}, or logits that are no distribution"
            self._fail("propose", OptionError(said))
        if not self._num_failures:
            return result
        return replace(result, drafter=DrafterFaults(self._num_failures, self.stopped))

    def _no_drafts(self, size: int) -> Draft:
        shape = size, self.drafter.num_drafts
        tokens = torch.zeros(shape, dtype=torch.int64, device=self._column.device)
        length = torch.zeros(size, dtype=torch.int32, device=self._column.device)
        return Draft(tokens, length, self._certain.repeat(*shape, 1) if self.keeps_logits else None)

    def _checked(self, draft: Draft, batch: StepBatch, num_wrong: Tensor) -> Draft:
        """The draft without the rows whose values are wrong, which `num_wrong` counts. OptionError for wrong shapes.

        Rows that pad a batch, or stop inside their prompt, are not counted.
        """
        size, vocab_size = batch.slot.shape[0], self.drafter.target.vocab_size
        shape = size, self.drafter.num_drafts
        if not isinstance(draft, Draft):
            raise OptionError(f"propose must return a Draft: {type(draft).__name__}")
        self._check("tokens", draft.tokens, shape, torch.int64)
        self._check("length", draft.length, (size,), torch.int32)
        bad = (draft.tokens < 0) | (draft.tokens >= vocab_size)
        if self.keeps_logits:
            self._check("logits", draft.logits, (*shape, vocab_size), torch.float32)
            assert draft.logits is not None
            bad |= ~draft.logits.amax(-1).isfinite()
        length, meant = draft.length, self._column < draft.length[:, None]
        wrong = (bad & meant).any(1) | (length < 0) | (length > shape[1])
        num_wrong += (wrong & (batch.logits_start.diff() > 0)).sum()
        bad |= wrong[:, None]
        logits = draft.logits if self.keeps_logits else None
        if logits is not None:
            logits = torch.where(bad[..., None], self._certain, logits).contiguous()
        return Draft(torch.where(bad, 0, draft.tokens), torch.where(wrong, 0, length), logits)

    def _check(self, what: str, found: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        device = self._column.device
        if not isinstance(found, Tensor):
            raise OptionError(f"{what} of a draft must be a tensor: {type(found).__name__}")
        if (tuple(found.shape), found.dtype, found.device) != (shape, dtype, device):
            raise OptionError(
                f"{what} of a draft must be {dtype} {list(shape)} on {device}: "
                f"{found.dtype} {list(found.shape)} on {found.device}"
            )

    def _take(self, method: str, error: Exception) -> None:
        """Takes note of what the drafter raised, or raises it again while the runner is built."""
        if not self._serving:
            raise error
        self._fail(method, error)

    def _fail(self, method: str, error: Exception) -> None:
        self._num_failures += 1
        name, said = self.drafter.name, f"{type(error).__name__}: {error}"
        first = self._num_failures == 1
        logger.log(
            logging.WARNING if first else logging.DEBUG,
            "drafter %s failed in %s: %s; its drafts of this step are dropped, and the text stays the same",
            name,
            method,
            said,
            exc_info=error,
            extra={"failed_drafter": name},
        )
        if self._num_failures >= MAX_FAILURES and not self.stopped:
            self.stopped = True
            logger.warning(
                "drafting by %s has stopped after %d failures: requests go on without drafts until the engine is "
                "built again; correct the drafter",
                name,
                self._num_failures,
                extra={"failed_drafter": name},
            )


@contextmanager
def building(drafter: str) -> Iterator[None]:
    """OptionError for what a drafter raises while it is made, other than errors of ours and lack of memory."""
    try:
        yield
    except (OutriderError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise OptionError(
            f"drafter {drafter} could not be built: {type(error).__name__}: {error}; correct it, or leave "
            "speculative_config out"
        ) from error
