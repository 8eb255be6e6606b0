"""Bands and records: honest reruns pass, every way to be worse (or better) does not, and a record is what was measured.

A report is a sample: the same drafter measured again must pass, and each way to be worse (or better)
must not. Rounds are drawn with a fixed seed; a round's drafts stand up to the first that falls.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from outrider import AcceptanceReport, CheckpointError
from outrider.acceptance.bands import Departure, departures, interval
from outrider.acceptance.diagnosis import suspect
from outrider.acceptance.records import (
    Expectation,
    Setting,
    find,
    mismatches,
    read_records,
    why_not_found,
    write_record,
)
from outrider.core.output import AcceptanceTally
from outrider.draft.base import Drafter
from outrider.draft.eagle.eagle3 import Eagle3
from outrider.draft.eagle.peagle import PEagle

RATES = (0.675, 0.376, 0.196, 0.084)
"""Of P-EAGLE on Qwen3-8B, as vLLM's own test expects them."""

DRAFTS = 4000


SETTING = Setting(
    model="fedcba9876543210",
    head=None,
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


@pytest.mark.parametrize("drafts", [100, 300, 2000])
def test_measuring_again_seldom_raises_an_alarm(drafts: int) -> None:
    # each of 7 figures has a band of 3 standard deviations (0.3 % outside), and some tolerance besides
    alarms = 0
    for seed in range(300):
        expected = record(sample(RATES, seed, drafts))
        alarms += bool(departures(expected, sample(RATES, 10_000 + seed, drafts)))
    assert alarms <= 300 * 0.03


FAULTS: dict[str, tuple[tuple[float, ...], set[tuple[str, int]]]] = {
    "every position": (tuple(0.7 * rate for rate in RATES), {("rate", 1), ("rate", 2), ("rate", 3)}),
    "all but the first": ((0.675, 0.20, 0.06, 0.02), {("rate", 2), ("ratio", 2)}),
    "after the first all but gone": ((0.675, 0.05, 0.002, 0.0), {("rate", 2), ("ratio", 2), ("rate", 4)}),
    "the last only": ((0.675, 0.376, 0.196, 0.03), {("rate", 4), ("ratio", 4)}),
    "nothing stands": ((0.0, 0.0, 0.0, 0.0), {("rate", 1), ("rate", 2), ("rate", 3), ("rate", 4)}),
    "everything stands": ((1.0, 1.0, 1.0, 1.0), {("rate", 1), ("ratio", 4)}),
    "a little too high": (tuple(1.15 * rate for rate in RATES), {("rate", 1)}),
    "the first higher, the rest as before": ((0.85, 0.376, 0.196, 0.084), {("rate", 1), ("ratio", 2)}),
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
        assert suspect(found, expected, report)


def test_ratios_catch_what_rates_within_their_bands_hide() -> None:
    # every rate at the edge of what is let pass, the first above and the second below
    expected = record(AcceptanceReport(10**6, 2 * 10**6, 900_000, (500_000, 400_000)))
    report = AcceptanceReport(10**6, 2 * 10**6, 902_000, (509_000, 393_000))
    assert positions(expected, report) == {("ratio", 2)}


PATTERNS: dict[str, tuple[tuple[float, ...], bool | None, str]] = {
    "higher": ((1.0, 1.0, 1.0, 1.0), True, "higher than recorded"),
    "another model": ((0.1, 0.02, 0.0, 0.0), None, "every position fell: .*weights"),
    "taps": (
        (0.59, 0.28, 0.12, 0.04),
        True,
        "every position fell somewhat, and further ones more: .*features one layer off",
    ),
    "taps, mildly": ((0.65, 0.34, 0.16, 0.05), True, "every position fell somewhat, and further ones more"),
    "stale prefix": ((0.59, 0.28, 0.12, 0.04), None, "every position fell somewhat, .*\\(keys that a prefix hit"),
    "in proportion": (tuple(0.75 * rate for rate in RATES), True, "every position fell by a like share"),
    "sequential": (
        (0.675, 0.01, 0.0, 0.0),
        True,
        "before 2 are .*collapsed: the parallel head is run one token at a t",
    ),
    "blind": ((0.675, 0.1, 0.02, 0.005), True, "before 2 are .*collapsed: mask rows do not see the context"),
    "stale": ((0.675, 0.3, 0.14, 0.05), True, "before 2 are .*fell somewhat: mask rows see something stale"),
    "handed on": ((0.675, 0.05, 0.002, 0.0), False, "before 2 are .*collapsed: what is handed from one pass"),
    "badly handed on": ((0.675, 0.3, 0.14, 0.05), False, "before 2 are .*fell somewhat: a guess does not quite"),
    "no head": ((0.675, 0.10, 0.02, 0.0), None, "before 2 are .*collapsed: a guess does not follow"),
    "no head, mildly": ((0.675, 0.3, 0.14, 0.05), None, "before 2 are .*fell somewhat: a guess does not quite"),
    "deep": ((0.675, 0.376, 0.196, 0.03), True, "before 4 are .*collapsed: they are deeper than the head was trained"),
    "both": ((0.5, 0.05, 0.002, 0.0), True, "every position fell, those from 2 on collapsed"),
    "nothing": ((0.0, 0.0, 0.0, 0.0), True, "every position fell"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_suspected_cause_follows_the_pattern(pattern: str) -> None:
    rates, parallel, cause = PATTERNS[pattern]
    drafter = {True: PEagle, False: Eagle3, None: Drafter}[parallel]
    expected = record(sample(RATES, 1, 10_000))
    for seed in range(2, 12):
        report = sample(rates, seed, 10_000)
        assert re.search(cause, suspect(departures(expected, report), expected, report, drafter))


def test_a_drafter_that_stopped_drafting_is_noticed() -> None:
    expected = record(sample(RATES, 1))
    for report in (AcceptanceReport(0, 0, 0, (0, 0, 0, 0)), AcceptanceReport()):
        found = departures(expected, report)
        assert found, "no drafts at all passed for as many as were recorded"
        assert "nothing was drafted" in suspect(found, expected, report)


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
        "head": "1" * 16,
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


def test_an_option_that_was_not_given_is_no_difference() -> None:
    told = {"num_speculative_tokens": 4, "seed_of_its_own": None}
    assert replace(SETTING, draft_options=told) == SETTING and SETTING.num_drafts == 4


def test_recorded_and_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "acceptance.json"
    greedy = record(sample(RATES, 1), tolerance=0.07)
    write_record(path, greedy)
    assert read_records(path) == [greedy]
    assert json.loads(path.read_text())["records"][0].keys() >= {"setting", "drafts", "rates", "acceptance_length"}


def test_a_file_holds_a_record_for_each_setting(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    greedy = record(sample(RATES, 1))
    warm = replace(greedy, setting=replace(SETTING, temperature=0.7), rates=(0.5, 0.2, 0.1, 0.05))
    short = record(sample(RATES[:2], 1))
    for one in (greedy, warm, short):
        write_record(path, one)
    again = replace(warm, rates=(0.6, 0.3, 0.1, 0.05))
    write_record(path, again)
    records = read_records(path)
    assert records == [greedy, again, short], "a record takes the place of the one of its setting"
    assert find(records, warm.setting) == again and find(records, short.setting) == short
    assert why_not_found(records, greedy.setting) == []
    asked = replace(SETTING, temperature=1.0, dtype="bfloat16")
    assert find(records, asked) is None
    assert sorted(why_not_found([*records], asked)) == [
        "dtype is bfloat16, recorded with float32",
        "temperature is 1.0, recorded with 0.0",
    ]
    assert why_not_found([], asked) == ["nothing is recorded"]


BROKEN: dict[str, Any] = {
    "missing": None,
    "not-json": "{",
    "no-object": "[1]",
    "one-record-alone": json.dumps(asdict(record(sample(RATES, 1)))),
    "records-of-nothing": '{"records": null}',
    "record-of-nothing": '{"records": [null]}',
    "key-missing": {"rates": ...},
    "key-unknown": {"colour": "red"},
    "rates-of-nothing": {"rates": None},
    "rates-of-text": {"rates": ["a", "b", "c", "d"]},
    "rates-past-1": {"rates": [0.5, 0.4, 0.3, 1.2]},
    "rates-of-nan": {"rates": [0.5, 0.4, 0.3, float("nan")]},
    "another-k": {"rates": [0.5, 0.2]},
    "no-drafts": {"drafts": 0},
    "setting-of-nothing": {"setting": None},
    "setting-unknown": {"setting": {"colour": "red"}},
    "k-of-text": {"setting": {**asdict(SETTING), "draft_options": {"num_speculative_tokens": "4"}}},
    "drafts-of-text": {"drafts": "many"},
    "tolerance-of-text": {"tolerance": "wide"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record(name: str, tmp_path: Path) -> None:
    path, broken = tmp_path / "acceptance.json", BROKEN[name]
    write_record(path, record(sample(RATES, 1)))
    if broken is None:
        path.unlink()
    elif isinstance(broken, str):
        path.write_text(broken)
    else:
        (entry,) = json.loads(path.read_text())["records"]
        kept = {key: value for key, value in {**entry, **broken}.items() if value is not ...}
        path.write_text(json.dumps({"records": [kept]}))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_records(path)


def test_one_setting_recorded_twice(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    write_record(path, record(sample(RATES, 1)))
    (entry,) = json.loads(path.read_text())["records"]
    path.write_text(json.dumps({"records": [entry, entry]}))
    with pytest.raises(CheckpointError, match="one setting twice: record 2"):
        read_records(path)


def test_departures_read_as_sentences() -> None:
    assert str(Departure("rate", 1, 0.7, 0.2, 0.6, 0.8)) == "rate at position 1: 0.200, expected 0.600 to 0.800"
    ratio = Departure("ratio", 2, 0.7, 0.9, 0.6, 0.8)
    assert str(ratio) == "ratio at positions 1 to 2: 0.900, expected 0.600 to 0.800" and not ratio.fell


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_records_outlive_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "acceptance.json"
    first = Expectation(SETTING, 100, RATES, 2.0)
    write_record(path, first)
    path.chmod(0o640)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    class Full(io.TextIOWrapper):
        write = fail

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr("builtins.open", lambda file, *_, **__: Full(io.FileIO(file, "w")))
        else:
            patch.setattr(os, failing, fail)
            patch.setattr(Path, "replace", fail if failing == "replace" else Path.replace)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            write_record(path, replace(first, drafts=200))
    assert isinstance(error, KeyboardInterrupt) or "the records there are as they were" in str(raised.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["acceptance.json"]
    write_record(path, replace(first, drafts=200))
    assert [record.drafts for record in read_records(path)] == [200]
    assert path.stat().st_mode & 0o777 == 0o640, "as readable as it was"
