"""What acceptance is expected to be, and what departs from it: the records beside a head, and their bands.

A head, and the bundled model for methods without one, comes with an `acceptance.json`: one record for each setting that
was measured. `outrider accept` compares a run with the record of its own setting; the engine's watchdog holds the
traffic it serves against the one nearest to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from outrider.core.option import wrong_types
from outrider.core.output import AcceptanceReport
from outrider.errors import CheckpointError

RECORDS = "acceptance.json"
"""The file beside a head's weights that holds its records."""

DEVIATIONS = 3.0
"""Standard deviations of sampling noise that a band allows for on top of its tolerance."""

COLLAPSE, GONE = 0.5, 0.05
"""A figure under this share of the recorded one has collapsed, or is as good as nothing; above, it is merely worse."""

HINT = 1.5
"""Standard deviations by which figures within their bands, taken together, hint that they fell like those outside."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What acceptance was measured on: with any of it different, figures do not compare."""

    model: str  # fingerprint of the target's checkpoint
    head: str | None  # fingerprint of the draft head's; None: the method has none
    dtype: str
    method: str
    draft_options: dict[str, Any]  # what the method was told; None, which is "not told", is left out
    verifier: str
    prompts: str  # hash of the prompt set
    max_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        told = {name: value for name, value in self.draft_options.items() if value is not None}
        object.__setattr__(self, "draft_options", told)

    @property
    def num_drafts(self) -> int:
        """K: most tokens drafted a round."""
        return int(self.draft_options["num_speculative_tokens"])


@dataclass(frozen=True, slots=True)
class Expectation:
    """Acceptance as it was recorded, and what it was recorded on."""

    setting: Setting
    drafts: int
    rates: tuple[float, ...]
    acceptance_length: float
    tolerance: float = 0.02  # relative, on each rate and each ratio

    @classmethod
    def of(cls, setting: Setting, report: AcceptanceReport) -> Expectation:
        """What a run measured, as what later ones are held to."""
        return cls(setting, report.drafts, report.rates, report.length)

    @classmethod
    def from_dict(cls, given: Any) -> Expectation:
        """One record of an acceptance.json. ValueError, saying what is wrong, if it is none."""
        try:
            recorded = cls(**{**given, "setting": Setting(**given["setting"]), "rates": tuple(given["rates"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        for record in (recorded.setting, recorded):
            for name, value, wanted in wrong_types(record):
                raise ValueError(f"{name} must be {wanted}: {value!r}")
        width = recorded.setting.draft_options.get("num_speculative_tokens")
        if len(recorded.rates) != width:
            raise ValueError(f"it holds {len(recorded.rates)} rates for {width} drafts a round")
        if not all(0.0 <= rate <= 1.0 for rate in recorded.rates) or recorded.drafts < 1 or recorded.tolerance < 0:
            raise ValueError(f"rates, drafts or tolerance are out of range: {given}")
        return recorded

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each rate over the one before it."""
        pairs = zip(self.rates, self.rates[1:], strict=False)
        return tuple(after / before if before else 0.0 for before, after in pairs)


def read_records(path: Path) -> list[Expectation]:
    """Every record of an acceptance.json. CheckpointError, naming the file, if it is missing or not one."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    entries = given.get("records") if isinstance(given, Mapping) else None
    if not isinstance(entries, list):
        raise CheckpointError(f'not an acceptance record: {path}: it must hold {{"records": [...]}}')
    records: list[Expectation] = []
    for number, entry in enumerate(entries, start=1):
        try:
            record = Expectation.from_dict(entry)
        except ValueError as error:
            raise CheckpointError(f"not an acceptance record: {path}, record {number}: {error}") from error
        if find(records, record.setting):
            raise CheckpointError(f"{path} records one setting twice: record {number} repeats an earlier one")
        records.append(record)
    return records


def write_record(path: Path, record: Expectation) -> None:
    """Puts a record into an acceptance.json, in place of the one of the same setting; other records stay."""
    records = read_records(path) if path.exists() else []
    found = find(records, record.setting)
    if found is None:
        records.append(record)
    else:
        records[records.index(found)] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"records": [asdict(entry) for entry in records]}, indent=2) + "\n", encoding="utf-8")


def find(records: Sequence[Expectation], setting: Setting) -> Expectation | None:
    """The record of exactly this setting."""
    return next((record for record in records if record.setting == setting), None)


def mismatches(recorded: Setting, measured: Setting) -> list[str]:
    """What makes a comparison meaningless, a line each."""
    names = [entry.name for entry in fields(Setting)]
    pairs = [(name, getattr(recorded, name), getattr(measured, name)) for name in names]
    return [f"{name} is {now}, recorded with {then}" for name, then, now in pairs if then != now]


def why_not_found(records: Sequence[Expectation], setting: Setting) -> list[str]:
    """How the record nearest to a setting differs from it; nothing if it is there."""
    differing = [mismatches(record.setting, setting) for record in records]
    return min(differing, key=len) if differing else ["nothing is recorded"]


@dataclass(frozen=True, slots=True)
class Departure:
    """A figure outside its band."""

    figure: str  # "rate" or "ratio"
    position: int
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

    Ratios are held too because a band on rates alone misses a collapse that spares position 0. The noise is what two
    samples of independent rounds would differ by. Rounds of one text are alike, so figures of other prompts differ by
    more; but both samples are of the same prompts with the same seeds, and what the texts have in common cancels.
    """
    if not report.drafts:
        return [Departure("rate", 0, expected.rates[0], 0.0, expected.rates[0], 1.0)]
    found: list[Departure] = []
    trials = (expected.drafts, report.drafts)
    for position, (then, now) in enumerate(zip(expected.rates, report.rates, strict=True)):
        found += _outside("rate", position, then, now, trials, expected.tolerance)
    of = zip(expected.ratios, report.ratios, ratio_trials(expected, report), strict=True)
    for position, (then, now, trials) in enumerate(of, start=1):
        found += _outside("ratio", position, then, now, trials, expected.tolerance)
    return found


def ratio_trials(expected: Expectation, report: AcceptanceReport) -> list[tuple[int, int]]:
    """How many rounds each ratio is of: those in which the guess before stood, in the record and in the report."""
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
