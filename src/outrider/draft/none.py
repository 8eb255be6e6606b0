"""No speculation: the same program with a drafter that proposes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from outrider.capability import Feature
from outrider.core.option import option
from outrider.draft.base import DraftContext, Drafter, DraftOptions
from outrider.errors import OptionError
from outrider.tensors import Draft


@dataclass(frozen=True, slots=True)
class NoDraftOptions(DraftOptions):
    """There is nothing to choose."""

    num_speculative_tokens: int = option(0, "always 0")

    def __post_init__(self) -> None:
        if self.num_speculative_tokens != 0:
            raise OptionError(
                f"method none drafts nothing, so num_speculative_tokens must be 0: {self.num_speculative_tokens}; "
                "name a method to draft with"
            )


class NoDrafter(Drafter):
    """K = 0."""

    name: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Feature]] = frozenset()
    Options: ClassVar[type[DraftOptions]] = NoDraftOptions

    def propose(self, context: DraftContext) -> Draft:
        slot = context.batch.slot
        return Draft(slot.new_empty((slot.shape[0], 0)), context.committed.new_zeros(slot.shape[0]), None)
