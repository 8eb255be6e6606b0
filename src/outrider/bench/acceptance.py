"""How many drafts are accepted at each position: runs a prompt set and compares with the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from outrider.acceptance.bands import Departure, departures, interval
from outrider.acceptance.diagnosis import suspect
from outrider.acceptance.records import Expectation, Setting, find, why_not_found
from outrider.acceptance.setting import setting_of
from outrider.bench.prompts import PromptSet
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.draft.base import Drafter
from outrider.engine.llm import LLM


def setting_of_run(llm: LLM, prompts: PromptSet, sampling: SamplingParams) -> Setting:
    """The setting of a run that is about to be made."""
    return setting_of(
        llm.engine.resolved,
        prompts=prompts.hash,
        max_tokens=sampling.max_tokens or 0,
        temperature=sampling.temperature,
    )


def measure(
    llm: LLM,
    prompts: PromptSet,
    sampling: SamplingParams,
    progress: Callable[[int, int], None] | None = None,
) -> AcceptanceReport:
    """Runs every prompt and adds up how its drafts fared.

    Each prompt has a seed of its own, from the engine's, so that a run does not depend on those before it.
    """
    first = llm.engine.resolved.options.seed
    seeded = [replace(sampling, seed=(first + index) % 2**63) for index in range(len(prompts.texts))]
    outputs = llm.generate(list(prompts.texts), seeded, progress=progress)
    for output in outputs:
        output.raise_for_error()
    return sum((output.acceptance for output in outputs), AcceptanceReport())


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run, and the record of its setting if there is one."""

    setting: Setting
    report: AcceptanceReport
    expected: Expectation | None
    why_not: tuple[str, ...]  # how the setting differs from the nearest on record
    drafter: type[Drafter]  # asked for the cause of a fall

    @classmethod
    def of(
        cls,
        setting: Setting,
        report: AcceptanceReport,
        records: Sequence[Expectation] | None,  # None: there are none to compare with
        drafter: type[Drafter] = Drafter,
    ) -> Comparison:
        """A run beside what is on record for exactly its setting."""
        expected = find(records or (), setting)
        why_not = () if expected or records is None else tuple(why_not_found(records, setting))
        return cls(setting, report, expected, why_not, drafter)

    @property
    def departures(self) -> list[Departure]:
        """The figures outside their bands."""
        return departures(self.expected, self.report) if self.expected else []

    @property
    def passed(self) -> bool | None:
        """Whether acceptance is as recorded; None if nothing is recorded for this setting."""
        return None if self.expected is None else not self.departures

    @property
    def suspect(self) -> str | None:
        """The likeliest cause of the departures."""
        found = self.departures
        return suspect(found, self.expected, self.report, self.drafter) if found and self.expected else None

    def to_dict(self) -> dict[str, Any]:
        """As `accept --json` prints a run."""
        expected, report = self.expected, self.report
        return {
            **asdict(self.setting),
            **report.to_dict(),
            "intervals": [list(interval(rate, report.drafts)) for rate in report.rates],
            "expected": None
            if expected is None
            else {
                "rates": list(expected.rates),
                "ratios": list(expected.ratios),
                "acceptance_length": expected.acceptance_length,
                "drafts": expected.drafts,
                "tolerance": expected.tolerance,
            },
            "passed": self.passed,
            "departures": [
                {"temperature": self.setting.temperature, **asdict(departure), "message": str(departure)}
                for departure in self.departures
            ],
            "suspect": self.suspect,
            "not_compared": list(self.why_not),
        }


def summary(runs: Sequence[Comparison]) -> dict[str, Any]:
    """As `accept --json` prints them: the first run's keys, all `runs`, and what is true of all of them.

    `passed` is false if any run departed, else None if any had nothing to be compared with; `departures` are all runs'.
    """
    records = [run.to_dict() for run in runs]
    verdicts = [run.passed for run in runs]
    return {
        **records[0],
        "passed": False if False in verdicts else None if None in verdicts else True,
        "departures": [departure for run in records for departure in run["departures"]],
        "suspect": next((run["suspect"] for run in records if run["suspect"]), None),
        "runs": records,
    }
