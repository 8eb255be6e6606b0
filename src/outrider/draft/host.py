"""The shortest way to a drafter of one's own: plain Python over lists of token ids."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from outrider.capability import Feature
from outrider.core.reading import written_short
from outrider.draft.base import DraftContext, Drafter
from outrider.errors import OptionError
from outrider.tensors import Draft


class HostDrafter(Drafter):
    """A drafter that thinks on the host: subclass it, write `guess`, name it as `module:Class`.

    It reads tensors on the host, so it runs where a runner offers HOST_CODE. A subclass that sets
    no `name` is called `module:Class`.
    """

    name: ClassVar[str] = "host"
    needs: ClassVar[frozenset[Feature]] = frozenset({Feature.HOST_CODE, Feature.TOKEN_HISTORY})

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def guess(self, slot: int, tokens: list[int]) -> Sequence[int]:
        """Up to K token ids to follow `tokens` (prompt and output so far); more are cut off.

        `slot` stays the same for a request's life, between `admit` and `release`.
        """

    def propose(self, context: DraftContext) -> Draft:
        slots, batch = context.slots, context.batch
        size = batch.slot.shape[0]
        drafted = torch.zeros((size, self.num_drafts), dtype=torch.int64)
        length = torch.zeros(size, dtype=torch.int32)
        past_prompt = (batch.logits_start[1:] > batch.logits_start[:-1]).tolist()
        for row, (slot, samples) in enumerate(zip(batch.slot.tolist(), past_prompt, strict=True)):
            if not samples:
                continue
            history = slots.tokens[slot, : int(slots.length[slot])].tolist()
            guesses = self._checked(self.guess(slot, history))
            drafted[row, : len(guesses)] = torch.tensor(guesses, dtype=torch.int64)
            length[row] = len(guesses)
        return Draft(drafted.to(batch.slot.device), length.to(batch.slot.device), None)

    def _checked(self, given: Sequence[int]) -> list[int]:
        """The first K guesses as plain integers. OptionError for what is no token of the target's."""
        try:
            guesses = [operator.index(token) for token in list(given)[: self.num_drafts]]
        except TypeError:
            shown = written_short(given)
            raise OptionError(f"drafter {type(self).__name__} must guess whole numbers: {shown}") from None
        wrong = [token for token in guesses if not 0 <= token < self.target.vocab_size]
        if wrong:
            raise OptionError(
                f"drafter {type(self).__name__} guessed token {wrong[0]}, "
                f"outside the vocabulary of {self.target.vocab_size}"
            )
        return guesses
