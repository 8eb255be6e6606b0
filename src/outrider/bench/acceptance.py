"""How many drafts stand, position by position, and whether that is what it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from outrider.bench.prompts import PromptSet
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import CheckpointError
from outrider.load.checkpoint import fingerprint, read_json

DEVIATIONS = 3.0
"""Standard deviations of sampling noise that a band allows for on top of its tolerance."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What acceptance was measured on: with any of it different, figures do not compare."""

    model: str  # fingerprint of the checkpoint
    dtype: str
    method: str
    draft_options: dict[str, Any]
    verifier: str
    prompts: str  # hash of the prompt set
    max_tokens: int
    temperature: float

    @classmethod
    def of(cls, llm: LLM, prompts: PromptSet, sampling: SamplingParams) -> Setting:
        """The setting of a run that is about to be made."""
        runner = llm.engine.resolved.runner
        return cls(
            model=fingerprint(llm.engine.resolved.directory),
            dtype=str(runner.dtype).removeprefix("torch."),
            method=runner.drafter.name,
            draft_options=asdict(runner.draft_options),
            verifier=runner.verifier.name,
            prompts=prompts.hash,
            max_tokens=sampling.max_tokens or 0,
            temperature=sampling.temperature,
        )


@dataclass(frozen=True, slots=True)
class Expectation:
    """Acceptance as it was recorded, and what it was recorded on."""

    setting: Setting
    drafts: int
    rates: tuple[float, ...]
    acceptance_length: float
    tolerance: float = 0.05  # relative, on each rate and each ratio

    @classmethod
    def of(cls, setting: Setting, report: AcceptanceReport) -> Expectation:
        """What a run measured, as what later ones are held to."""
        return cls(setting, report.drafts, report.rates, report.length)

    @classmethod
    def read(cls, path: Path) -> Expectation:
        """From acceptance.json; CheckpointError if the file is not one."""
        given = read_json(path)
        try:
            rates = tuple(float(rate) for rate in given["rates"])
            recorded = cls(**{**given, "setting": Setting(**given["setting"]), "rates": rates})
            width = recorded.setting.draft_options["num_speculative_tokens"]
            numbers = (recorded.drafts, recorded.acceptance_length, recorded.tolerance, width)
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise TypeError(f"drafts, acceptance_length, tolerance and K must be numbers: {numbers}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not an acceptance record: {path}: {error}") from error
        if len(rates) != width:
            raise CheckpointError(f"{path} records {len(rates)} rates for {width} drafts a round")
        return recorded

    def write(self, path: Path) -> None:
        """As acceptance.json."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each rate over the one before it."""
        return tuple(
            after / before if before else 0.0 for before, after in zip(self.rates, self.rates[1:], strict=False)
        )


@dataclass(frozen=True, slots=True)
class Departure:
    """A figure outside its band."""

    figure: str  # "rate" or "ratio"
    position: int
    expected: float
    measured: float
    low: float
    high: float

    def __str__(self) -> str:
        at = (
            f"position {self.position}"
            if self.figure == "rate"
            else f"positions {self.position - 1} to {self.position}"
        )
        return f"{self.figure} at {at}: {self.measured:.3f}, expected {self.low:.3f} to {self.high:.3f}"


def measure(
    llm: LLM,
    prompts: PromptSet,
    sampling: SamplingParams,
    progress: Callable[[int, int], None] | None = None,
) -> AcceptanceReport:
    """Runs every prompt and adds up how its drafts fared."""
    outputs = llm.generate(list(prompts.texts), sampling, progress=progress)
    return sum((output.acceptance for output in outputs), AcceptanceReport())


def mismatches(recorded: Setting, measured: Setting) -> list[str]:
    """What makes a comparison meaningless, a line each."""
    names = [entry.name for entry in fields(Setting)]
    pairs = [(name, getattr(recorded, name), getattr(measured, name)) for name in names]
    return [f"{name} is {now}, recorded with {then}" for name, then, now in pairs if then != now]


def departures(expected: Expectation, report: AcceptanceReport) -> list[Departure]:
    """The rates, and the ratios of neighbours, that left their two-sided bands.

    Ratios are held too because a band on rates alone misses a collapse that spares position 0.
    """
    if not report.drafts:
        return [Departure("rate", 0, expected.rates[0], 0.0, expected.rates[0], 1.0)]
    found: list[Departure] = []
    trials = (expected.drafts, report.drafts)
    for position, (then, now) in enumerate(zip(expected.rates, report.rates, strict=True)):
        found += _outside("rate", position, then, now, trials, expected.tolerance)
    for position, (then, now) in enumerate(zip(expected.ratios, report.ratios, strict=True), start=1):
        trials = (round(expected.rates[position - 1] * expected.drafts), report.per_position[position - 1])
        found += _outside("ratio", position, then, now, trials, expected.tolerance)
    return found


def _outside(
    figure: str,
    position: int,
    then: float,
    now: float,
    trials: tuple[int, int],  # of the record, of this run
    tolerance: float,
) -> list[Departure]:
    recorded, measured = trials
    # what two samples of one rate differ by; one success and one failure are added, or a rate of 1 had no noise
    pooled = (then * recorded + now * measured + 1) / (recorded + measured + 2)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / max(recorded, 1) + 1 / max(measured, 1)))
    noise = DEVIATIONS * deviation
    low, high = then * (1 - tolerance) - noise, then * (1 + tolerance) + noise
    return [] if low <= now <= high else [Departure(figure, position, then, now, low, high)]


def interval(rate: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a rate."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.96
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return centre - half, centre + half


def suspect(found: Sequence[Departure]) -> str:
    """The likeliest cause of a set of departures, from the pattern they make."""
    falls = [departure for departure in found if departure.measured < departure.expected]
    if not falls:
        return "acceptance is higher than recorded: another model, head or prompt set; record it anew if it is meant"
    first = min(departure.position for departure in falls)
    if first == 0:
        return "every position fell: the drafter conditions on the wrong thing, or the model is not the recorded one"
    return (
        f"positions before {first} are as recorded: drafts after them are conditioned wrongly "
        "(a parallel head run one token at a time, or stale state)"
    )


def summary(
    setting: Setting, expected: Expectation | None, report: AcceptanceReport, found: Sequence[Departure]
) -> dict[str, Any]:
    """As `accept --json` prints it."""
    return {
        **asdict(setting),
        **report.to_dict(),
        "intervals": [list(interval(rate, report.drafts)) for rate in report.rates],
        "expected": None if expected is None else {"rates": list(expected.rates), "ratios": list(expected.ratios)},
        "passed": None if expected is None else not found,
        "departures": [{**asdict(departure), "message": str(departure)} for departure in found],
        "suspect": suspect(found) if found else None,
    }
