"""A short run of the fuzz of checkpoints, and that it notices what it looks for."""

from __future__ import annotations

import pytest

import fuzz_checkpoints
from outrider.core.reading import Fact
from outrider.layers.rope_scaling import YarnScaling

SEED = 0


def check(first: int, count: int) -> None:
    report = fuzz_checkpoints.fuzz(SEED, first, count)
    assert not report.failures, "\n".join(report.failures[:20])
    assert report.outcomes["equal"] > count // 8
    assert {"refused by both", "refused by us alone", "head serves", "tokenizer serves"} <= report.outcomes.keys()
    assert {"head refused", "tokenizer refused"} <= report.outcomes.keys()


def test_random_checkpoints() -> None:
    check(0, 250)


@pytest.mark.slow
def test_many_random_checkpoints() -> None:
    check(250, 4000)


def test_other_frequencies_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YarnScaling, "attention_factor", 1.0)
    report = fuzz_checkpoints.fuzz(SEED, 0, 120)
    assert any("tokens are off by" in failure for failure in report.failures), report.outcomes


def test_another_end_of_text_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.config.end_of_text", lambda *_: ((), Fact("end of text", [], {})))
    report = fuzz_checkpoints.fuzz(SEED, 0, 120)
    assert any("texts end at {" in failure for failure in report.failures), report.outcomes


def test_an_error_of_python_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("hidden_size")

    monkeypatch.setattr(fuzz_checkpoints, "ours", broken)
    report = fuzz_checkpoints.fuzz(SEED, 0, 5)
    assert any("KeyError: 'hidden_size'" in failure for failure in report.failures), report.failures
