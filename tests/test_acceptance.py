"""Acceptance is counted exactly, and a collapse of it is noticed, wherever it begins.

A report is a sample: the same drafter measured again must pass, and each way to be worse (or better)
must not. Rounds are drawn with a fixed seed; a round's drafts stand up to the first that falls.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, Knowing, Right, Sometimes, Wrong, plugin, run, write_tokenizer
from checkpoints import write as write_model
from outrider import LLM, AcceptanceReport, CheckpointError, SamplingParams
from outrider.bench.acceptance import Expectation, Setting, departures, interval, measure, mismatches, summary, suspect
from outrider.bench.prompts import PromptSet
from outrider.cli.main import main
from outrider.core.output import AcceptanceTally

RATES = (0.675, 0.376, 0.196, 0.084)
"""Of P-EAGLE on Qwen3-8B, as vLLM's own test expects them."""

DRAFTS = 4000


SETTING = Setting(
    model="fedcba9876543210",
    dtype="float32",
    method="ngram",
    draft_options={"num_speculative_tokens": 4},
    verifier="exact",
    prompts="0123456789abcdef",
    max_tokens=128,
    temperature=0.0,
)


def sample(rates: Sequence[float], seed: int, drafts: int = DRAFTS) -> AcceptanceReport:
    """Rounds drawn with these rates."""
    rng = random.Random(seed)
    tally = AcceptanceTally(len(rates))
    for _ in range(drafts):
        luck = rng.random()
        tally.record(len(rates), sum(luck < rate for rate in rates))
    return tally.report()


def record(report: AcceptanceReport, **changes: Any) -> Expectation:
    """The report as an expectation."""
    return replace(
        Expectation.of(replace(SETTING, draft_options={"num_speculative_tokens": len(report.rates)}), report), **changes
    )


def positions(expected: Expectation, report: AcceptanceReport) -> set[tuple[str, int]]:
    return {(departure.figure, departure.position) for departure in departures(expected, report)}


def test_the_same_report_passes() -> None:
    report = sample(RATES, 1)
    assert departures(record(report), report) == []
    told = summary(SETTING, record(report), report, [])
    assert told["passed"] is True and told["departures"] == [] and told["suspect"] is None


@pytest.mark.parametrize("drafts", [100, 300, 2000])
def test_measuring_again_seldom_raises_an_alarm(drafts: int) -> None:
    # each of 7 figures has a band of 3 standard deviations (0.3 % outside), and some tolerance besides
    alarms = 0
    for seed in range(300):
        expected = record(sample(RATES, seed, drafts))
        alarms += bool(departures(expected, sample(RATES, 10_000 + seed, drafts)))
    assert alarms <= 300 * 0.03


FAULTS: dict[str, tuple[tuple[float, ...], set[tuple[str, int]]]] = {
    "every position": (tuple(0.7 * rate for rate in RATES), {("rate", 0), ("rate", 1), ("rate", 2)}),
    "all but the first": ((0.675, 0.20, 0.06, 0.02), {("rate", 1), ("ratio", 1)}),
    "after the first all but gone": ((0.675, 0.05, 0.002, 0.0), {("rate", 1), ("ratio", 1), ("rate", 3)}),
    "the last only": ((0.675, 0.376, 0.196, 0.03), {("rate", 3), ("ratio", 3)}),
    "nothing stands": ((0.0, 0.0, 0.0, 0.0), {("rate", 0), ("rate", 1), ("rate", 2), ("rate", 3)}),
    "everything stands": ((1.0, 1.0, 1.0, 1.0), {("rate", 0), ("ratio", 3)}),
    "a little too high": (tuple(1.15 * rate for rate in RATES), {("rate", 0)}),
    "the first higher, the rest as before": ((0.85, 0.376, 0.196, 0.084), {("rate", 0), ("ratio", 1)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_departures_are_found(fault: str) -> None:
    rates, least = FAULTS[fault]
    expected = record(sample(RATES, 1))
    for seed in range(20):
        report = sample(rates, seed)
        assert least <= positions(expected, report)
        found = departures(expected, report)
        assert all(not departure.low <= departure.measured <= departure.high for departure in found)
        assert all(f"{departure.measured:.3f}" in str(departure) for departure in found)
        assert summary(SETTING, expected, report, found)["passed"] is False


def test_ratios_catch_what_rates_within_their_bands_hide() -> None:
    # every rate at the edge of what is let pass, the first above and the second below
    expected = record(AcceptanceReport(10**6, 2 * 10**6, 900_000, (500_000, 400_000)))
    report = AcceptanceReport(10**6, 2 * 10**6, 905_000, (523_000, 382_000))
    assert positions(expected, report) == {("ratio", 1)}


def test_the_suspected_cause_follows_the_pattern() -> None:
    expected = record(sample(RATES, 1))
    told = {fault: suspect(departures(expected, sample(rates, 2))) for fault, (rates, _) in FAULTS.items()}
    assert "every position fell" in told["every position"]
    assert "positions before 1 are as recorded" in told["all but the first"]
    assert "positions before 3 are as recorded" in told["the last only"]
    assert "higher than recorded" in told["everything stands"]


def test_a_drafter_that_stopped_drafting_is_noticed() -> None:
    expected = record(sample(RATES, 1))
    for report in (AcceptanceReport(0, 0, 0, (0, 0, 0, 0)), AcceptanceReport()):
        assert departures(expected, report), "no drafts at all passed for as many as were recorded"


def test_intervals() -> None:
    for rate, trials in itertools.product((0.0, 0.1, 0.5, 0.97, 1.0), (1, 10, 1000)):
        low, high = interval(rate, trials)
        assert -1e-9 <= low <= rate + 1e-9 and rate - 1e-9 <= high <= 1 + 1e-9
    assert interval(0.3, 0) == (0.0, 1.0)
    covered = 0
    for seed in range(300):
        low, high = interval(sample((0.4,), seed, 150).rates[0], 150)
        covered += low <= 0.4 <= high
    assert 0.92 <= covered / 300 <= 0.98, "a 95 % interval"


def test_what_cannot_be_compared() -> None:
    assert mismatches(SETTING, SETTING) == []
    changes: dict[str, Any] = {
        "model": "0" * 16,
        "dtype": "bfloat16",
        "method": "other",
        "draft_options": {"num_speculative_tokens": 4, "prompt_lookup_min": 1},
        "verifier": "synthetic",
        "prompts": "f" * 16,
        "max_tokens": 7,
        "temperature": 0.5,
    }
    assert changes.keys() == {entry.name for entry in fields(Setting)}
    for name, value in changes.items():
        (found,) = mismatches(SETTING, replace(SETTING, **{name: value}))
        assert name in found and str(value) in found and str(getattr(SETTING, name)) in found


def test_prompt_sets_are_told_apart() -> None:
    sets = [("a", "b"), ("b", "a"), ("a",), ("a", "b "), ("ab",)]
    assert len({PromptSet("x", texts).hash for texts in sets}) == len(sets)
    assert PromptSet("x", ("a",)).hash == PromptSet("y", ("a",)).hash


def test_recorded_and_read(tmp_path: Path) -> None:
    expected = record(sample(RATES, 1), tolerance=0.07)
    path = tmp_path / "deep" / "acceptance.json"
    expected.write(path)
    assert Expectation.read(path) == expected


BROKEN = {
    "missing": None,
    "not-json": "{",
    "no-object": "[1]",
    "key-missing": {"rates": ...},
    "key-unknown": {"colour": "red"},
    "rates-of-nothing": {"rates": None},
    "rates-of-text": {"rates": ["a", "b", "c", "d"]},
    "another-k": {"rates": [0.5, 0.2]},
    "setting-of-nothing": {"setting": None},
    "setting-unknown": {"setting": {"colour": "red"}},
    "drafts-of-text": {"drafts": "many"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record(name: str, tmp_path: Path) -> None:
    path, broken = tmp_path / "acceptance.json", BROKEN[name]
    record(sample(RATES, 1)).write(path)
    if broken is None:
        path.unlink()
    elif isinstance(broken, str):
        path.write_text(broken)
    else:
        whole = {**json.loads(path.read_text()), **broken}
        path.write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=str(path)):
        Expectation.read(path)


# On a running engine.

K = 4


@pytest.fixture(scope="module")
def served(tiny: Callable[..., Path]) -> tuple[str, list[Case], list[list[int]]]:
    """A checkpoint, requests, and what follows their prompts, further than they ask."""
    path = str(tiny("qwen3"))
    longer = [Case.of(length, salt, temperature=0.8, max_tokens=60) for salt, length in enumerate((5, 13, 40))]
    with LLM(path, max_model_len=128) as llm:
        known = [[*case.prompt, *ones[0][0]] for case, ones in zip(longer, run(llm, longer), strict=True)]
    asked = (1, 12, 31)
    cases = [
        Case.of(length, salt, temperature=0.8, max_tokens=count)
        for salt, (length, count) in enumerate(zip((5, 13, 40), asked, strict=True))
    ]
    return path, cases, known


def reports(served: Any, drafter: type[Knowing], monkeypatch: pytest.MonkeyPatch) -> list[AcceptanceReport]:
    path, cases, known = served
    monkeypatch.setattr(Knowing, "known", known)
    with LLM(path, max_model_len=128, speculative_config=plugin(drafter, K)) as llm:
        prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
        found = [output.acceptance for output in llm.generate(prompts, [case.sampling for case in cases])]
        assert sum(found, AcceptanceReport()) == llm.acceptance(), "requests add up to the engine"
    return found


def test_always_right(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case, report in zip(served[1], reports(served, Right, monkeypatch), strict=True):
        rounds = -(-(case.sampling.max_tokens - 1) // (K + 1))  # the first token is the prompt's own
        assert report == AcceptanceReport(rounds, rounds * K, rounds * K, (rounds,) * K)
        assert report.length == (K + 1 if rounds else 1.0)


def test_always_wrong(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case, report in zip(served[1], reports(served, Wrong, monkeypatch), strict=True):
        rounds = case.sampling.max_tokens - 1
        assert report == AcceptanceReport(rounds, rounds * K, 0, (0,) * K)
        assert report.length == 1.0 and set(report.rates) == {0.0}


def test_sometimes_right(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(reports(served, Sometimes, monkeypatch), AcceptanceReport())
    assert 0 < total.accepted < total.drafted
    assert sum(total.per_position) == total.accepted and sorted(total.per_position)[::-1] == list(total.per_position)


def test_measuring_adds_up_all_prompts(served: Any) -> None:
    drafting = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 1}
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    seen: list[tuple[int, int]] = []
    with LLM(served[0], max_model_len=128, speculative_config=drafting) as llm:
        texts = PromptSet("x", ("abcabcabc", "one two one two", "!!!!!!!!!!"))
        report = measure(llm, texts, sampling, lambda done, total: seen.append((done, total)))
        assert report == llm.acceptance() and report.drafts > 0
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def accept(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    model = write_tokenizer(write_model(tmp_path / "model"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abcabcabcabc", "xyxyxyxy", "!!!!!!")))

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        drafts = ["--draft", "ngram", "-k", "3", "--prompts", str(prompts), "--max-tokens", "24", "--json"]
        monkeypatch.setattr(sys, "argv", ["outrider", "accept", str(model), *drafts, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), json.loads(shown.out) if shown.out else {}, shown.err

    return call


def test_the_command(accept: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    code, told, _ = accept("--record", str(path))
    assert code == 0 and told["passed"] is None and len(told["rates"]) == 3 and told["drafts"] > 0
    assert {"ratios", "acceptance_length", "expected", "departures"} <= told.keys()
    code, told, _ = accept("--expect", str(path))
    assert code == 0 and told["passed"] is True and told["expected"]["rates"] == told["rates"]
    lower = Expectation.read(path)
    replace(lower, rates=(1.0, 1.0, 1.0), drafts=10**6).write(path)
    code, told, _ = accept("--expect", str(path))
    assert code == 1 and told["passed"] is False and told["departures"][0]["position"] == 0
    lower.write(path)
    for flags, message in (
        (("-k", "2"), "'num_speculative_tokens': 2"),
        (("--num-prompts", "2"), "prompts is"),
    ):
        code, told, err = accept("--expect", str(path), *flags)
        assert code == 2 and told["type"] == "OptionError" and message in err and "cannot be compared" in err
    path.write_text("{")
    code, _, err = accept("--expect", str(path))
    assert code == 2 and "acceptance.json" in err
