"""The watchdog warns of a fall that lasts, once, names it, and leaves honest traffic alone."""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, Knowing, plugin, run
from heads import tiny_head
from outrider import LLM, AcceptanceReport, SamplingParams
from outrider.acceptance import watchdog as module
from outrider.acceptance.records import Expectation, Setting, write_record
from outrider.acceptance.setting import setting_of
from outrider.acceptance.watchdog import CHECK_EVERY, WINDOW, Watch, Watchdog
from outrider.config import resolve
from outrider.draft.eagle.peagle import PEagle
from outrider.options import EngineOptions

RATES = (0.675, 0.376, 0.196, 0.084)
SEQUENTIAL = (0.675, 0.05, 0.002, 0.0)
SETTING = Setting(
    "fedcba9876543210", "0123", "float32", "mine", {"num_speculative_tokens": 4}, "exact", "0123456789abcdef", 128, 0.0
)


def expectation(rates: Sequence[float] = RATES, drafts: int = 6000) -> Expectation:
    setting = replace(SETTING, draft_options={"num_speculative_tokens": len(rates)})
    return Expectation(setting, drafts, tuple(rates), 1 + sum(rates))


def serve(watch: Watch, rates: Sequence[float], num_rounds: int, rng: random.Random) -> None:
    for _ in range(num_rounds):
        luck = rng.random()
        watch.record(len(rates), sum(luck < rate for rate in rates))
        watch.check()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def recoveries(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "as recorded again" in record.getMessage()]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="outrider")


@pytest.mark.parametrize("seed", range(5))
def test_a_collapse_after_a_healthy_start_warns_once_and_recovers_once(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch, rng = Watch(expectation(), PEagle), random.Random(seed)
    serve(watch, RATES, 3 * WINDOW, rng)
    assert not caplog.records and not watch.state().departures
    serve(watch, SEQUENTIAL, 6 * WINDOW, rng)
    (told,) = warnings(caplog)
    assert "mine (K=4, temperature 0) fell" in told and "ratio at positions 1 to 2" in told
    assert "one token at a time" in told
    state = watch.state()
    assert min(departure.position for departure in state.departures) == 2
    assert state.suspect is not None and "positions before 2" in state.suspect
    serve(watch, RATES, 6 * WINDOW, rng)
    assert len(warnings(caplog)) == 1 and len(recoveries(caplog)) == 1 and not watch.state().departures
    serve(watch, SEQUENTIAL, 6 * WINDOW, rng)
    assert len(warnings(caplog)) == 2, "another departure is told again"


def test_a_head_that_is_wrong_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(expectation(), PEagle)
    serve(watch, SEQUENTIAL, 2 * WINDOW + CHECK_EVERY, random.Random(1))
    assert len(warnings(caplog)) == 1


def test_a_fall_at_an_earlier_position_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    watch, rng = Watch(expectation(), PEagle), random.Random(1)
    serve(watch, SEQUENTIAL, 4 * WINDOW, rng)
    serve(watch, (0.02, 0.0, 0.0, 0.0), 8 * WINDOW, rng)
    first, second = warnings(caplog)
    assert "rate at position 1" in second and "rate at position 1" not in first
    serve(watch, SEQUENTIAL, 8 * WINDOW, rng)
    assert len(warnings(caplog)) == 2, "what is left of it has been told"


@pytest.mark.parametrize("drafts", [500, 6000])
def test_honest_fluctuation_is_left_alone(drafts: int, caplog: pytest.LogCaptureFixture) -> None:
    """Requests of some dozens of rounds each, some much easier and some much harder than the record's mean."""
    for seed in range(10):
        rng = random.Random(seed)
        watch = Watch(expectation(drafts=drafts), PEagle)
        for _ in range(12 * WINDOW // 40):
            ease = rng.uniform(0.6, 1.3)
            ratios = [RATES[0], *(after / before for before, after in itertools.pairwise(RATES))]
            rates, rate = [], 1.0
            for ratio in ratios:
                rate *= min(1.0, ratio * ease)
                rates.append(rate)
            serve(watch, rates, 40, rng)
    assert not caplog.records


def test_easier_traffic_is_no_departure(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(expectation())
    serve(watch, (1.0, 1.0, 1.0, 1.0), 4 * WINDOW, random.Random(1))
    assert not caplog.records and not watch.falls()


def test_a_blip_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    watch, rng = Watch(expectation()), random.Random(1)
    serve(watch, RATES, 2 * WINDOW, rng)
    serve(watch, (0.0, 0.0, 0.0, 0.0), 3 * WINDOW // 4, rng)
    assert watch.falls()
    serve(watch, RATES, 4 * WINDOW, rng)
    assert not caplog.records


def test_figures_are_those_of_the_last_rounds() -> None:
    window = 10
    watch = Watch(expectation((0.5, 0.5)), window=window)
    stood = [2, 0, 1, 2, 2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 2, 1]
    for place, count in enumerate(stood, start=1):
        watch.record(2, count)
        last = stood[max(0, place - window) : place]
        per_position = tuple(sum(one > position for one in last) for position in range(2))
        assert watch.measured() == AcceptanceReport(len(last), 2 * len(last), sum(last), per_position)
    watch.record(1, 1)
    last = [*last[1:], 1]
    assert watch.measured() == AcceptanceReport(window, 2 * window - 1, sum(last), (7, 3)), "a round of one draft"


@pytest.mark.parametrize("verified", [1, 2, 3])
def test_rounds_that_verify_fewer_drafts_count_at_their_own_positions(
    verified: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounds of several K are held against the record at the positions that they reach, and at no other."""
    rng = random.Random(verified)
    watch = Watch(expectation(), PEagle)
    for _ in range(200):
        serve(watch, RATES[:verified], 15, rng)
        serve(watch, RATES, 5, rng)
    assert not caplog.records
    assert min(watch.measured().rates) < 0.084 * 0.75, "divided by all rounds, the last rate would have fallen"
    for _ in range(300):
        serve(watch, SEQUENTIAL[:verified], 15, rng)
        serve(watch, SEQUENTIAL, 5, rng)
    (told,) = warnings(caplog)
    assert "ratio at positions 1 to 2" in told


def test_traffic_of_few_drafts_alone_is_watched(caplog: pytest.LogCaptureFixture) -> None:
    watch, rng = Watch(expectation(), PEagle), random.Random(1)
    serve(watch, RATES[:2], 4 * WINDOW, rng)
    assert not caplog.records
    serve(watch, SEQUENTIAL[:2], 4 * WINDOW, rng)
    assert len(warnings(caplog)) == 1


# On an engine.

K = 3


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_head(True), tmp_path / "head"))


def drafting(head: Path, num_drafts: int = K) -> dict[str, Any]:
    return {"model": str(head), "num_speculative_tokens": num_drafts}


def record_for(
    path: Path, model: Path, config: dict[str, Any], rates: Sequence[float], temperature: float = 0.0, **changes: Any
) -> None:
    resolved = resolve(EngineOptions(model=str(model), speculative_config=config))
    setting = setting_of(resolved, prompts="of some kind", max_tokens=99, temperature=temperature)
    write_record(path, Expectation(replace(setting, **changes), 5000, tuple(rates), 1 + sum(rates)))


def idle(model: Path, config: dict[str, Any] | None, **options: Any) -> str:
    found = Watchdog.of(resolve(EngineOptions(model=str(model), speculative_config=config, **options))).state()
    assert found.watched == () and not found.departed and found.idle is not None
    assert json.loads(json.dumps(found.to_dict()))["idle"] == found.idle
    return found.idle


def test_why_there_is_nothing_to_watch(tiny: Callable[..., Path], head: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, path = tiny("qwen3"), head / "acceptance.json"
    assert idle(model, None) == "there are no drafts"
    assert idle(model, {"method": "ngram"}) == "nothing is on record"
    assert f"there is no {path}" in idle(model, drafting(head))
    path.write_text('{"records": []}')
    assert "it is empty" in idle(model, drafting(head))
    record_for(path, model, drafting(head), (0.9, 0.8, 0.7))
    record_for(path, model, drafting(head, 2), (0.9, 0.8))
    assert "{'num_speculative_tokens': 5" in idle(model, drafting(head, 5))
    assert "head is" in idle(model, drafting(with_other_weights(head)))
    assert "model is" in idle(tiny("qwen3", tie_word_embeddings=True), drafting(head))
    assert "model is random weights" in idle(model, drafting(head), load_format="dummy")
    made_up = {"verifier": "synthetic", "synthetic_rates": [0.5] * K}
    assert idle(model, drafting(head), **made_up) == "verifier synthetic makes acceptance up"
    assert "verifier is rejection" in idle(model, drafting(head), verifier="rejection")
    assert not warnings(caplog)
    path.write_text("{")
    assert "acceptance.json" in idle(model, drafting(head))
    assert "not watched" in warnings(caplog)[0] and str(path) in warnings(caplog)[0]


def with_other_weights(head: Path) -> Path:
    other = Path(shutil.copytree(head, head.parent / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "said": "other"}))
    return other


def test_records_of_any_prompts_are_held_and_the_lowest_counts(tiny: Callable[..., Path], head: Path) -> None:
    model, path = tiny("qwen3"), head / "acceptance.json"
    record_for(path, model, drafting(head), (0.9, 0.8, 0.7))
    record_for(path, model, drafting(head), (0.6, 0.5, 0.4), prompts="of another", dtype="bfloat16")
    record_for(path, model, drafting(head), (0.5, 0.3, 0.2), temperature=0.7)
    moved = Path(shutil.copytree(head, head.parent / "moved"))
    with LLM(str(model), speculative_config=drafting(moved)) as llm:
        state = llm.watchdog()
        assert state.idle is None and state.window == WINDOW
        assert {watched.temperature: watched.expected.rates for watched in state.watched} == {
            0.0: (0.6, 0.5, 0.4),
            0.7: (0.5, 0.3, 0.2),
        }
        cases = [
            Case.of(12, 1, temperature=0.0, ignore_eos=False, top_k=5),  # the likeliest token is among any five
            Case.of(12, 2, temperature=0.7, ignore_eos=False),
            Case.of(12, 3, temperature=0.7, ignore_eos=False, top_p=0.5),
            Case.of(12, 4, temperature=0.6, ignore_eos=False),
            Case.of(12, 5, temperature=0.0),  # ignores the end of the text
        ]
        greedy, warm = (llm.generate(list(case.prompt), case.sampling)[0].acceptance for case in cases[:2])
        run(llm, cases[2:])
        state = llm.watchdog()
    assert state.num_unwatched == 3
    assert [watched.measured.drafts for watched in state.watched] == [rounds(greedy), rounds(warm)]
    told = json.loads(json.dumps(state.to_dict()))
    assert told["watched"][0]["measured"]["drafts"] == rounds(greedy) and told["departed"] is False


def rounds(report: AcceptanceReport) -> int:
    """Those of K drafts, if no other was short."""
    return report.drafted // K


class Collapsing(Knowing):
    """Right, until it is only right about the first token."""

    name = "collapsing"
    collapsed = False

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        guesses = self.truth(tokens)
        return self.corrupt(guesses, at=1) if Collapsing.collapsed else guesses


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Collapsing]]:
    monkeypatch.setattr(Collapsing, "collapsed", False)
    yield Collapsing


def test_an_engine_warns_of_its_drafter(
    tiny: Callable[..., Path],
    tmp_path: Path,
    collapsing: type[Collapsing],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, path, config = tiny("qwen3"), tmp_path / "acceptance.json", plugin(collapsing, K)
    sampling = SamplingParams(temperature=0.0, max_tokens=120, detokenize=False)
    prompts = [{"prompt_token_ids": list(Case.of(length, 1).prompt)} for length in (5, 9, 20, 31)]
    with LLM(str(model)) as llm:
        outputs = llm.generate(prompts, sampling)
        known = [[*out.prompt_token_ids, *out.outputs[0].token_ids] for out in outputs]
    monkeypatch.setattr(Knowing, "known", known)
    monkeypatch.setattr(module, "record_file", lambda resolved: path)
    record_for(path, model, config, (0.95, 0.9, 0.85))
    with LLM(str(model), speculative_config=config) as llm:
        llm.engine.watchdog = Watchdog.of(llm.engine.resolved, window=64)
        llm.generate(prompts, sampling)
        (watched,) = llm.watchdog().watched
        assert watched.measured.drafts >= 64 and watched.measured.rates[2] > 0.9 and not warnings(caplog)
        collapsing.collapsed = True
        for _ in range(3):
            llm.generate(prompts, sampling)
        (told,) = warnings(caplog)
        assert f"{collapsing.name} (K={K}, temperature 0) fell" in told and "rate at position 1" not in told
        assert llm.watchdog().departed
        collapsing.collapsed = False
        for _ in range(6):
            llm.generate(prompts, sampling)
        assert len(warnings(caplog)) == 1 and len(recoveries(caplog)) == 1 and not llm.watchdog().departed
