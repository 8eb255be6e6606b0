"""The likeliest cause of acceptance that left its bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.acceptance.bands import Departure, deviation, ratio_trials
from outrider.acceptance.records import Expectation
from outrider.core.output import AcceptanceReport

COLLAPSE, GONE = 0.5, 0.05
"""A figure under this share of the recorded one has collapsed, or is as good as nothing; above, it is merely worse."""

HINT = 1.5
"""Standard deviations by which figures within their bands, taken together, hint that they fell like those outside."""


def suspect(
    found: Sequence[Departure], expected: Expectation, report: AcceptanceReport, parallel: bool | None = None
) -> str:
    """The likeliest cause of a set of departures, from the pattern that all figures make.

    `parallel`: whether the drafter is a head that drafts in one pass, one that drafts in several, or (None) no head.
    """
    falls = [departure for departure in found if departure.fell]
    if not falls:
        return "acceptance is higher than recorded: another model, head or prompt set; record it anew if it is meant"
    if not report.drafts:
        return "nothing was drafted: the drafter proposes nothing, or no round had room for its guesses"
    pairs = [(expected.rates[0], report.rates[0]), *zip(expected.ratios, report.ratios, strict=True)]
    shares = [now / then if then else 1.0 for then, now in pairs]  # of the first rate, and of each ratio, that are left
    own = {fall.position for fall in falls if fall.figure == "ratio" or fall.position == 0}
    collapsed = min((place for place in own if shares[place] < COLLAPSE), default=None)
    if collapsed is not None:
        return _of_a_collapse(collapsed, shares, 0 in own, parallel)
    first = min(fall.position for fall in falls)
    trials = [(expected.drafts, report.drafts), *ratio_trials(expected, report)]
    signs = [(then - now) / deviation(then, now, of) for (then, now), of in zip(pairs, trials, strict=True)]
    if sum(signs[:first]) > HINT * math.sqrt(first):  # within their bands, but all of them low
        first = 0
    return _of_a_decline(first, bool(own - {0}) or first not in own, parallel)


def _of_a_collapse(at: int, shares: Sequence[float], from_the_first: bool, parallel: bool | None) -> str:
    if at == 0:
        return "every position fell: guesses are for other tokens, or come of another model's or head's weights"
    before = "every position fell" if from_the_first else f"positions before {at} are as recorded"
    collapsed = f"{before}, those from {at} on collapsed"
    if parallel is None:
        return f"{collapsed}: a guess does not follow from the one before it"
    if at > 1:
        return f"{collapsed}: they are deeper than the head was trained for, or past the positions it has"
    if not parallel:
        return (
            f"{collapsed}: what is handed from one pass to the next is not the last pass's (hidden state, token, keys)"
        )
    run_alone, misled = (
        "the parallel head is run one token at a time",
        ("mask rows do not see the context, or hold stale features of rejected tokens"),
    )
    likelier, other = (run_alone, misled) if shares[1] < GONE else (misled, run_alone)
    return f"{collapsed}: {likelier}; else {other}"


def _of_a_decline(first: int, ratios_too: bool, parallel: bool | None) -> str:
    if first == 0 and not ratios_too:
        return (
            "every position fell by a like share: some rounds start wrong and the rest are as recorded "
            "(stale keys after a preemption, or text unlike what was recorded)"
        )
    if first == 0:
        taps = "" if parallel is None else "features tapped a layer off, a norm left out, "
        return (
            "every position fell somewhat, and further ones more: what guesses are conditioned on is a little off "
            f"({taps}keys that a prefix hit brought and nobody ran again)"
        )
    declined = f"positions before {first} are as recorded, those from {first} on fell somewhat"
    if first > 1 and parallel is not None:
        return f"{declined}: they are deeper than the head was trained for, or past the positions it has"
    if parallel:
        return f"{declined}: mask rows see something stale (features of rejected tokens, or an earlier round's keys)"
    return f"{declined}: a guess does not quite follow from the one before it"
