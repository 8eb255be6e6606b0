"""The bands that recorded acceptance allows, and the figures of a run that lie outside theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outrider.acceptance.records import Expectation
from outrider.core.output import AcceptanceReport

DEVIATIONS = 3.0
"""Standard deviations of sampling noise that a band allows for on top of its tolerance."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A figure outside its band."""

    figure: str  # "rate" or "ratio"
    position: int  # of the draft in its round, from 1; of a ratio the later of the two
    expected: float
    measured: float
    low: float
    high: float

    @property
    def fell(self) -> bool:
        """Whether it is lower than expected."""
        return self.measured < self.low

    def __str__(self) -> str:
        at = (
            f"position {self.position}"
            if self.figure == "rate"
            else f"positions {self.position - 1} to {self.position}"
        )
        return f"{self.figure} at {at}: {self.measured:.3f}, expected {self.low:.3f} to {self.high:.3f}"


def departures(expected: Expectation, report: AcceptanceReport) -> list[Departure]:
    """The rates, and the ratios of neighbours, that left their two-sided bands.

    Ratios are held too because a band on rates alone misses a collapse that spares position 1. The noise is what two
    samples of independent rounds would differ by. Rounds of one text are alike, so figures of other prompts differ by
    more; but both samples are of the same prompts with the same seeds, and what the texts have in common cancels.
    """
    if not report.drafts:
        return [Departure("rate", 1, expected.rates[0], 0.0, expected.rates[0], 1.0)]
    found: list[Departure] = []
    trials = (expected.drafts, report.drafts)
    for position, (then, now) in enumerate(zip(expected.rates, report.rates, strict=True), start=1):
        found += _outside("rate", position, then, now, trials, expected.tolerance)
    of = zip(expected.ratios, report.ratios, ratio_trials(expected, report), strict=True)
    for position, (then, now, trials) in enumerate(of, start=2):
        found += _outside("ratio", position, then, now, trials, expected.tolerance)
    return found


def ratio_trials(expected: Expectation, report: AcceptanceReport) -> list[tuple[int, int]]:
    """Rounds that each ratio counts, of the record and of the report: those that accepted the draft before it."""
    recorded = (round(rate * expected.drafts) for rate in expected.rates[:-1])
    return list(zip(recorded, report.per_position[:-1], strict=True))


def _outside(
    figure: str,
    position: int,
    then: float,
    now: float,
    trials: tuple[int, int],  # of the record, of this run
    tolerance: float,
) -> list[Departure]:
    noise = DEVIATIONS * deviation(then, now, trials)
    low, high = then * (1 - tolerance) - noise, then * (1 + tolerance) + noise
    return [] if low <= now <= high else [Departure(figure, position, then, now, low, high)]


def deviation(then: float, now: float, trials: tuple[int, int]) -> float:
    """Standard deviation of the difference of two samples of one rate, of so many trials each.

    One success and one failure are added, or a rate of 1 had no noise.
    """
    recorded, measured = trials
    pooled = (then * recorded + now * measured + 1) / (recorded + measured + 2)
    return math.sqrt(pooled * (1 - pooled) * (1 / max(recorded, 1) + 1 / max(measured, 1)))


def interval(rate: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a rate, as if rounds were independent."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.96
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return centre - half, centre + half
