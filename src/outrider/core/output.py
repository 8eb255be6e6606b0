"""What comes out of a step and of a request, and how speculation fared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, zip_longest
from typing import NamedTuple, Protocol


class FinishReason(Enum):
    """Why a request ended; the values are the wire names."""

    STOP = "stop"  # a stop token, or a stop string that the engine found
    LENGTH = "length"  # max_tokens or max_model_len reached
    ABORT = "abort"  # the caller went away, or the engine failed
    ERROR = "error"  # no token can be drawn from its logits


class TokenDelta(NamedTuple):
    """What one request gained in one step. The scheduler hands these to the engine."""

    request_id: str
    tokens: tuple[int, ...]  # new tokens, a stop token included
    num_accepted: int  # how many of them, from the first, were accepted drafts
    finish_reason: FinishReason | None  # None: more will come
    stop_token: int | None  # the token that ended it; part of `tokens`, but not of the text


@dataclass(frozen=True, slots=True)
class AcceptanceReport:
    """How many drafts were accepted, counted as vLLM counts them; reports add up.

    A draft is one row's step that verified at least one token. The first output token comes from the
    prompt's own step and counts no draft; the last step counts all it accepted, past the end too.
    """

    drafts: int = 0  # rounds
    drafted: int = 0  # tokens proposed and verified
    accepted: int = 0  # drafts that were accepted
    per_position: tuple[int, ...] = ()  # of `accepted`, by position in the round: the first entry is position 1
    drafting_ended: str | None = None  # why a request gets no drafts any more, or never got any; None: it gets them

    @property
    def rates(self) -> tuple[float, ...]:
        """Accepted at each position per draft, as vLLM prints it; zeros before the first draft."""
        return tuple(count / self.drafts if self.drafts else 0.0 for count in self.per_position)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Accepted at each position over accepted at the one before: shows a collapse that spares position 1.

        One shorter than `rates`; 0 where nothing was accepted before.
        """
        pairs = zip(self.per_position, self.per_position[1:], strict=False)
        return tuple(after / before if before else 0.0 for before, after in pairs)

    @property
    def length(self) -> float:
        """Mean tokens a target step yields: 1 + accepted / drafts; 1 when nothing was drafted."""
        return 1.0 + (self.accepted / self.drafts if self.drafts else 0.0)

    def __add__(self, other: AcceptanceReport) -> AcceptanceReport:
        if not isinstance(other, AcceptanceReport):
            return NotImplemented
        pairs = zip_longest(self.per_position, other.per_position, fillvalue=0)
        return AcceptanceReport(
            self.drafts + other.drafts,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            tuple(a + b for a, b in pairs),
            self.drafting_ended or other.drafting_ended,
        )

    def since(self, earlier: AcceptanceReport) -> AcceptanceReport:
        """What came after an earlier report of the same tally."""
        pairs = zip_longest(self.per_position, earlier.per_position, fillvalue=0)
        return AcceptanceReport(
            self.drafts - earlier.drafts,
            self.drafted - earlier.drafted,
            self.accepted - earlier.accepted,
            tuple(a - b for a, b in pairs),
            self.drafting_ended,
        )

    def to_dict(self) -> dict[str, object]:
        """The JSON shape of `--json` and of the server; `drafting_ended` is there if there is a reason."""
        shape: dict[str, object] = {
            "drafts": self.drafts,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "per_position": list(self.per_position),
            "rates": list(self.rates),
            "ratios": list(self.ratios),
            "acceptance_length": self.length,
        }
        return shape if self.drafting_ended is None else {**shape, "drafting_ended": self.drafting_ended}


class RoundCounter(Protocol):
    """Counts every round that verified drafts."""

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """One round that verified `num_drafted` > 0 drafts, of which the first `num_accepted` were accepted."""


class AcceptanceTally:
    """Counts rounds cheaply - one histogram bin a round - and makes reports when asked.

    `num_drafts` is K, so that a report has K positions from the start; a wider round widens it.
    """

    __slots__ = ("_drafted", "_rounds", "drafting_ended")

    def __init__(self, num_drafts: int = 0) -> None:
        self.drafting_ended: str | None = None  # as in the report
        self._rounds = [0] * (num_drafts + 1)  # rounds by how many drafts were accepted
        self._drafted = 0

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """One round that verified `num_drafted` > 0 drafts, of which the first `num_accepted` were accepted."""
        missing = num_drafted + 1 - len(self._rounds)
        if missing > 0:
            self._rounds.extend([0] * missing)
        self._drafted += num_drafted
        self._rounds[num_accepted] += 1

    @classmethod
    def of(cls, drafted: int, rounds: Sequence[int], drafting_ended: str | None = None) -> AcceptanceTally:
        """A tally from the `counts` of another, which may be of another process."""
        tally = cls()
        tally._drafted, tally._rounds, tally.drafting_ended = drafted, list(rounds), drafting_ended
        return tally

    @property
    def counts(self) -> tuple[int, tuple[int, ...]]:
        """Tokens drafted, and rounds by how many drafts were accepted."""
        return self._drafted, tuple(self._rounds)

    def report(self) -> AcceptanceReport:
        """The counts so far."""
        reached = list(accumulate(reversed(self._rounds)))[::-1]  # rounds in which at least i were accepted
        accepted = tuple(reached[1:])
        return AcceptanceReport(reached[0], self._drafted, sum(accepted), accepted, self.drafting_ended)
