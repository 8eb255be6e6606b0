"""Prompt lookup: guesses copied from the row's own history. No weights, and free where text repeats itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from outrider.capability import Feature
from outrider.core.option import option
from outrider.draft.base import ANY_MODEL, DraftContext, Drafter, DraftOptions, TargetFacts
from outrider.errors import OptionError
from outrider.kernels.ngram import NGRAM_LOOKUP
from outrider.tensors import Draft


@dataclass(frozen=True, slots=True)
class NgramOptions(DraftOptions):
    """How much of the text's end must have occurred before. Names as in vLLM."""

    prompt_lookup_min: int = option(2, "minimum of last tokens that must match; fewer find more, and worse, guesses")
    prompt_lookup_max: int = option(5, "maximum of last tokens compared; a longer match is preferred")

    def __post_init__(self) -> None:
        DraftOptions.__post_init__(self)
        self.check_whole("prompt_lookup_min", 1)
        self.check_whole("prompt_lookup_max", 1)
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise OptionError(
                f"prompt_lookup_max must be at least prompt_lookup_min: {self.prompt_lookup_max} is less than "
                f"{self.prompt_lookup_min}; raise the one or lower the other"
            )


class Ngram(Drafter):
    """Looks up the longest match of the history's end, the latest among equals; see `kernels.ngram`."""

    name: ClassVar[str] = "ngram"
    needs: ClassVar[frozenset[Feature]] = frozenset({Feature.TOKEN_HISTORY})
    Options: ClassVar[type[DraftOptions]] = NgramOptions
    default_for: ClassVar[str | None] = ANY_MODEL

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        super().__init__(options, target)
        assert isinstance(options, NgramOptions)
        self._shortest, self._longest = options.prompt_lookup_min, options.prompt_lookup_max
        self._lookup = NGRAM_LOOKUP.on(target.device)

    def propose(self, context: DraftContext) -> Draft:
        slots, batch = context.slots, context.batch
        tokens, length = self._lookup(
            slots.tokens,
            slots.length,
            batch.slot,
            batch.logits_start,
            self.num_drafts,
            self._shortest,
            self._longest,
        )
        return Draft(tokens, length, None)
