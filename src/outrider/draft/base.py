"""The contract between a drafter and whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from outrider.capability import Feature, Part
from outrider.core.option import option
from outrider.errors import OptionError
from outrider.tensors import Draft, Purpose, Slots, StepBatch, TargetOutput

MAX_DRAFTS = 32
"""Most tokens a round may draft: beyond it verification costs more than any acceptance returns."""


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What every method can be told. A method with more to tell extends this record in its own file."""

    num_speculative_tokens: int = option(4, "tokens to draft a round (K)")

    def __post_init__(self) -> None:
        self.check_whole("num_speculative_tokens", 1, MAX_DRAFTS)

    def check_whole(self, name: str, least: int, most: int | None = None) -> None:
        """OptionError unless the option is a whole number within bounds."""
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            bounds = f"{least} or more" if most is None else f"from {least} to {most}"
            raise OptionError(f"{name} must be a whole number, {bounds}: {value!r}")


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter may know of the model it drafts for when it is built."""

    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_num_seqs: int
    device: torch.device
    dtype: torch.dtype


@dataclass(slots=True)
class DraftContext:
    """All a drafter may look at. Read-only: a drafter writes only state of its own."""

    batch: StepBatch  # what the target has just run
    target: TargetOutput
    committed: Tensor  # [B] int32, how many of each row's query tokens now stand
    next_token: Tensor  # [B] int64, the token after them: sampled, or the prompt's next
    slots: Slots  # this step's tokens already committed
    noise: Purpose  # what to draw guesses with: the verifier's `draft_noise`


class Drafter(ABC):
    """Guesses what comes next. One file per method; one method that matters.

    A drafter never sees the scheduler, the verifier or another request's state, and may be
    wrong at no cost but speed: the verifier keeps the output exact whatever it proposes.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Feature]]
    Options: ClassVar[type[DraftOptions]] = DraftOptions
    rerun: ClassVar[int] = 0  # prompt tokens to run again after a prefix hit, to rebuild what the drafter keeps
    writes_ahead: ClassVar[bool] = False  # whether `propose` writes cache positions past a row's last query token
    gives_logits: ClassVar[bool] = False  # whether `propose` says what its guesses were drawn from

    num_drafts: int
    """K: most guesses a row."""

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        self.num_drafts = options.num_speculative_tokens
        self.target = target

    @classmethod
    def part(cls) -> Part:
        """The drafter as the oracle sees it."""
        return Part(f"drafter {cls.name}", cls.needs)

    @abstractmethod
    def propose(self, context: DraftContext) -> Draft:
        """Guess up to K more tokens for every row; rows inside their prompt get a length of 0.

        Called once after every step that leaves a row past its prompt. Unless HOST_CODE is in
        `needs`, it may not read a tensor on the host nor make a shape depend on one, so that a
        runner can record it.
        """

    def admit(self, slot: int, tokens: Sequence[int]) -> None:  # noqa: B027 - a hook, not a duty
        """A request took `slot`. Slots are reused, so forget whatever the last one left."""

    def release(self, slot: int) -> None:  # noqa: B027
        """The request in `slot` is gone."""
