"""Compares the acceptance of served traffic with the record of the draft head, and warns when it falls.

The output stays right whatever a drafter does, so a head that is run wrongly shows nowhere but here: in speed, and in
which of its drafts are accepted.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from outrider.acceptance.bands import DEVIATIONS, Departure, deviation
from outrider.acceptance.diagnosis import suspect
from outrider.acceptance.records import Expectation, Setting, mismatches, read_records
from outrider.acceptance.setting import record_file, setting_of
from outrider.config import Resolved
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import FIELDS, TEMPERATURE, Effect
from outrider.draft.base import Drafter
from outrider.draft.registry import NO_DRAFTS
from outrider.errors import CheckpointError

logger = logging.getLogger("outrider")

WINDOW = 1024
"""Rounds that the figures are over, and for which a change must last before it is believed."""

CHECK_EVERY = 128
"""Rounds between two looks at the figures."""

TOLERANCE = 0.5
"""Share of the first rate, and of each ratio, that traffic may lose against the record.

The measurements lie far on either side of half. They are of the bundled model's default method at K=4:

- windows of the very prompts on record lose up to 0.14 of a figure, prose given to that model of code 0.27, and the
  first rounds of texts cut off after 16 tokens 0.47;
- a head that is run wrongly (one token at a time, or with stale features) loses 0.85 or more of a ratio.

A fault that costs less, such as features of the layer before, shows only in `outrider accept` on the recorded prompts.
"""


@dataclass(frozen=True, slots=True)
class WatchedState:
    """How the rounds of one temperature fare."""

    temperature: float
    expected: Expectation
    measured: AcceptanceReport  # over the last rounds, at most a window
    departures: tuple[Departure, ...]  # as last reported; empty: as recorded, or too early to say
    suspect: str | None

    def to_dict(self) -> dict[str, Any]:
        """As the server and its metrics print it."""
        return {
            "temperature": self.temperature,
            "expected": {"rates": list(self.expected.rates), "ratios": list(self.expected.ratios)},
            "measured": self.measured.to_dict(),
            "departures": [{**asdict(departure), "message": str(departure)} for departure in self.departures],
            "suspect": self.suspect,
        }


@dataclass(frozen=True, slots=True)
class WatchState:
    """What the watchdog knows."""

    idle: str | None  # why nothing is watched; None: it is
    watched: tuple[WatchedState, ...]  # a temperature on record each
    num_unwatched: int  # requests sampled in a way that is not on record
    window: int  # rounds
    tolerance: float = TOLERANCE

    @property
    def departed(self) -> bool:
        """Whether any figure has fallen out of its band and not come back."""
        return any(watched.departures for watched in self.watched)

    def to_dict(self) -> dict[str, Any]:
        """As the server and its metrics print it."""
        return {
            "idle": self.idle,
            "departed": self.departed,
            "watched": [watched.to_dict() for watched in self.watched],
            "num_unwatched": self.num_unwatched,
            "window": self.window,
            "tolerance": self.tolerance,
        }


class Watch:
    """The last rounds at one temperature, beside what is on record for it."""

    def __init__(self, expected: Expectation, drafter: type[Drafter] = Drafter, window: int = WINDOW) -> None:
        """`drafter`: the method, which is asked for the cause of a fall."""
        self.expected = expected
        self.departures: tuple[Departure, ...] = ()  # as last reported
        self._suspect: str | None = None
        self._drafter = drafter
        self._window = window
        self._num_drafts = expected.setting.num_drafts
        width = self._num_drafts + 1
        self._rounds = array(
            "H", [0] * window
        )  # a ring buffer: drafted * (K + 1) + accepted of each of the last rounds
        self._counts = [0] * (width * width)  # of those rounds, by that number
        self._num_rounds = 0
        self._next_check = window
        self._since: int | None = None  # round of the first sign of a change not yet reported

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """One round, which may have verified fewer than K drafts: it says nothing of the positions past its own."""
        index = self._num_rounds % self._window
        if self._num_rounds >= self._window:
            self._counts[self._rounds[index]] -= 1
        code = num_drafted * (self._num_drafts + 1) + num_accepted
        self._rounds[index] = code
        self._counts[code] += 1
        self._num_rounds += 1

    def measured(self) -> AcceptanceReport:
        """The rounds in the window."""
        found = list(self._found())
        per_position = tuple(sum(n for _, got, n in found if got > position) for position in range(self._num_drafts))
        drafted = sum(drafted * number for drafted, _, number in found)
        return AcceptanceReport(sum(number for *_, number in found), drafted, sum(per_position), per_position)

    def _found(self) -> Iterator[tuple[int, int, int]]:
        """How many rounds of the window drafted and accepted so many: (drafted, accepted, rounds)."""
        for code, number in enumerate(self._counts):
            if number:
                yield *divmod(code, self._num_drafts + 1), number

    def _as_if_of_k(self) -> AcceptanceReport:
        """What rounds of K drafts would have come to: each ratio as rounds show it that verified both its drafts."""
        found, report = list(self._found()), self.measured()
        per_position, share = [], float(report.drafts)
        for position in range(self._num_drafts):
            before = sum(n for drafted, accepted, n in found if drafted > position and accepted >= position)
            after = sum(n for _, accepted, n in found if accepted > position)
            share *= after / before if before else 0.0
            per_position.append(round(share))
        drafted = report.drafts * self._num_drafts
        return AcceptanceReport(report.drafts, drafted, sum(per_position), tuple(per_position))

    def falls(self) -> list[Departure]:
        """The figures that are under their bands now: each rate, and each ratio to the one before.

        A figure is measured by the rounds that verified a draft at its position. A rate is the product of the first
        and the ratios up to it, so it may lose as much as all of them. Only falls are reported: other text than was
        recorded may well be easier.
        """
        expected, rounds = self.expected, list(self._found())
        rates: list[Departure] = []
        ratios: list[Departure] = []
        for position, then in enumerate(expected.rates, start=1):
            reached = [(accepted, number) for drafted, accepted, number in rounds if drafted >= position]
            trials = sum(number for _, number in reached)
            accepted = sum(number for accepted, number in reached if accepted >= position)
            before = sum(number for accepted, number in reached if accepted >= position - 1)
            if trials:
                lowest = (1 - TOLERANCE) ** position
                rates += _under("rate", position, then, accepted / trials, (expected.drafts, trials), lowest)
            if trials and position > 1:
                recorded = round(expected.rates[position - 2] * expected.drafts)
                now, of = accepted / before if before else 0.0, (recorded, before)
                ratios += _under("ratio", position, expected.ratios[position - 2], now, of, 1 - TOLERANCE)
        return rates + ratios

    def check(self) -> None:
        """Looks at the figures if it is time. Logs a fall that has lasted a window, once, and its end.

        By then the window holds no round from before the change, so the report shows its full size. A drop at
        position i implies drops after it: only one at an earlier position is reported again.
        """
        if self._num_rounds < self._next_check:
            return
        self._next_check = self._num_rounds + min(CHECK_EVERY, self._window)
        found, reported = self.falls(), self.departures
        if bool(found) == bool(reported) and _first(found) >= _first(reported):
            self._since = None
        elif self._since is None:
            self._since = self._num_rounds
        elif self._num_rounds - self._since >= self._window:
            self._since = None
            self._report(found)

    def _report(self, found: list[Departure]) -> None:
        setting = self.expected.setting
        what = f"{setting.method} (K={setting.num_drafts}, temperature {setting.temperature:g})"
        self.departures = tuple(found)
        self._suspect = suspect(found, self.expected, self._as_if_of_k(), self._drafter) if found else None
        if not found:
            logger.info("acceptance of %s is as recorded again: %s", what, _figures(self.measured()))
            return
        logger.warning(
            "acceptance of %s fell over the last %d rounds: %s; suspected cause: %s",
            what,
            self._window,
            "; ".join(map(str, found)),
            self._suspect,
        )

    def state(self) -> WatchedState:
        """Its state."""
        temperature = self.expected.setting.temperature
        return WatchedState(temperature, self.expected, self.measured(), self.departures, self._suspect)


class Watchdog:
    """A watch for each temperature on record."""

    def __init__(self, watches: Iterable[Watch] = (), idle: str | None = None, window: int = WINDOW) -> None:
        """`idle`: why there is nothing to watch; `window`: the watches' own."""
        self._window = window
        self._watches = {watch.expected.setting.temperature: watch for watch in watches}
        self._idle = idle
        self._num_unwatched = 0

    @classmethod
    def of(cls, resolved: Resolved, window: int = WINDOW) -> Watchdog:
        """For an engine: with the records of its model, head and options, whatever prompts they were made with."""
        runner, path = resolved.runner, record_file(resolved)
        if resolved.method == NO_DRAFTS:
            return cls(idle="there are no drafts")
        if not runner.verifier.faithful:
            return cls(idle=f"verifier {runner.verifier.name} makes acceptance up")
        if path is None or not path.exists():
            return cls(idle="nothing is on record" if path is None else f"nothing is on record: there is no {path}")
        try:
            records, here = read_records(path), setting_of(resolved)
        except CheckpointError as error:
            logger.warning("acceptance is not watched: %s", error)
            return cls(idle=str(error))
        differing = [_differs(record.setting, here) for record in records]
        fitting = [record for record, differs in zip(records, differing, strict=True) if not differs]
        if not fitting:
            nearest = min(differing, key=len, default=["it is empty"])
            return cls(idle=f"nothing is on record for this in {path}: {'; '.join(nearest)}")
        lowest: dict[float, Expectation] = {}  # several prompt sets are on record: what is under all of them is a fall
        for record in sorted(fitting, key=lambda record: record.acceptance_length):
            lowest.setdefault(record.setting.temperature, record)
        return cls((Watch(record, runner.drafter, window) for record in lowest.values()), window=window)

    def watch(self, sampling: SamplingParams) -> Watch | None:
        """The watch that takes the rounds of a request; None if nothing is on record for its parameters."""
        if self._idle is not None:
            return None
        found = self._watches.get(sampling.temperature) if _plain(sampling) else None
        self._num_unwatched += found is None
        return found

    def check(self) -> None:
        """Checks the figures if it is time; call it after each step."""
        for watch in self._watches.values():
            watch.check()

    def state(self) -> WatchState:
        """The state of every watch."""
        watched = tuple(self._watches[temperature].state() for temperature in sorted(self._watches))
        return WatchState(self._idle, watched, self._num_unwatched, self._window)


def _differs(recorded: Setting, here: Setting) -> list[str]:
    """Why a record says nothing of this engine: it may be of any prompts, at any temperature, in any dtype."""
    any_of = {name: getattr(here, name) for name in ("prompts", "max_tokens", "temperature", "dtype")}
    return mismatches(replace(recorded, **any_of), here)


def _plain(sampling: SamplingParams) -> bool:
    """Whether tokens are drawn from what the model gives, as `accept` draws them, but for the temperature.

    Text past its own end (`ignore_eos`) is like no text on record either.
    """
    harmless = {Effect.NOTHING, Effect.TAIL} if sampling.greedy else {Effect.NOTHING}
    changing = (field for field in FIELDS if field is not TEMPERATURE and field.effect not in harmless)
    return not (sampling.ignore_eos or sampling.extra_args or any(field.asked(sampling) for field in changing))


def _under(
    figure: str, position: int, then: float, now: float, trials: tuple[int, int], share: float
) -> list[Departure]:
    low = then * share - DEVIATIONS * deviation(then, now, trials)
    return [Departure(figure, position, then, now, low, 1.0)] if now < low else []


def _first(found: Iterable[Departure]) -> int:
    return min((departure.position for departure in found), default=0)


def _figures(report: AcceptanceReport) -> str:
    rates = " ".join(f"{rate:.3f}" for rate in report.rates)
    return f"rates {rates}, acceptance length {report.length:.2f}"
