"""The likeliest cause of acceptance that left its bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.acceptance.bands import Departure, deviation, ratio_trials
from outrider.acceptance.records import Expectation
from outrider.core.output import AcceptanceReport
from outrider.draft.base import AcceptancePattern, Drafter

COLLAPSE = 0.5
"""A figure under this share of the recorded one has collapsed; above, it merely declined."""

HINT = 1.5
"""Standard deviations by which figures within their bands, taken together, hint that they fell like those outside."""


def suspect(
    found: Sequence[Departure],
    expected: Expectation,
    report: AcceptanceReport,
    drafter: type[Drafter] = Drafter,
) -> str:
    """The likeliest cause of a set of departures, from the pattern that all figures make.

    The method is asked for causes of its own: `Drafter.diagnose`.
    """
    falls = [departure for departure in found if departure.fell]
    if not falls:
        return "acceptance is higher than recorded: another model, head or prompt set; record it again if it is meant"
    if not report.drafts:
        return "nothing was drafted: the drafter proposes nothing, or no round had room for its guesses"
    pairs = [(expected.rates[0], report.rates[0]), *zip(expected.ratios, report.ratios, strict=True)]
    # what is left of the first rate, and of each ratio, by position
    shares = dict(enumerate((now / then if then else 1.0 for then, now in pairs), start=1))
    own = {fall.position for fall in falls if fall.figure == "ratio" or fall.position == 1}
    collapsed = min((position for position in own if shares[position] < COLLAPSE), default=None)
    if collapsed is not None:
        pattern = AcceptancePattern(collapsed, True, shares[collapsed])
        return _of_a_collapse(pattern, 1 in own, drafter)
    first = min(fall.position for fall in falls)
    trials = [(expected.drafts, report.drafts), *ratio_trials(expected, report)]
    signs = [(then - now) / deviation(then, now, of) for (then, now), of in zip(pairs, trials, strict=True)]
    # within their bands, but all of them low
    if sum(signs[: first - 1]) > HINT * math.sqrt(first - 1):
        first = 1
    pattern = AcceptancePattern(first, False, shares[first])
    return _of_a_decline(pattern, bool(own - {1}) or first not in own, drafter)


def _of_a_collapse(pattern: AcceptancePattern, from_the_first: bool, drafter: type[Drafter]) -> str:
    first = pattern.first
    if first == 1:
        return "every position fell: guesses are for other tokens, or come of another model's or head's weights"
    before = "every position fell" if from_the_first else f"positions before {first} are as recorded"
    cause = drafter.diagnose(pattern) or "a guess does not follow from the one before it"
    return f"{before}, those from {first} on collapsed: {cause}"


def _of_a_decline(pattern: AcceptancePattern, ratios_too: bool, drafter: type[Drafter]) -> str:
    first = pattern.first
    if first == 1 and not ratios_too:
        return (
            "every position fell by a like share: some rounds start wrong and the rest are as recorded "
            "(stale keys after a preemption, or text unlike what was recorded)"
        )
    cause = drafter.diagnose(pattern)
    if first == 1:
        general = (
            "what guesses are conditioned on is a little off (keys that a prefix hit brought and nobody ran again)"
        )
        return f"every position fell somewhat, and further ones more: {cause or general}"
    declined = f"positions before {first} are as recorded, those from {first} on fell somewhat"
    return f"{declined}: {cause or 'a guess does not quite follow from the one before it'}"
