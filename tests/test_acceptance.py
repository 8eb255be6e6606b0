"""Acceptance is counted exactly on a running engine, and `outrider accept` tells a head gone wrong from a right one."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, Knowing, Right, Sometimes, Wrong, plugin, run, write_tokenizer
from checkpoints import write as write_model
from heads import tiny_head
from outrider import LLM, AcceptanceReport, SamplingParams
from outrider.acceptance.records import read_records, write_record
from outrider.acceptance.watchdog import WINDOW
from outrider.bench.acceptance import measure
from outrider.bench.prompts import HELD_OUT, PromptSet, read_prompts
from outrider.cli.main import main
from outrider.load.hub import BUNDLED, BUNDLED_HEADS
from outrider.load.tokenizer import Tokenizer

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


def test_prompt_sets_are_told_apart() -> None:
    sets = [("a", "b"), ("b", "a"), ("a",), ("a", "b "), ("ab",)]
    assert len({PromptSet("x", texts).hash for texts in sets}) == len(sets)
    assert PromptSet("x", ("a",)).hash == PromptSet("y", ("a",)).hash


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

    def call(*arguments: str, draft: str = "ngram") -> tuple[int, dict[str, Any], str]:
        asked = ["--draft", draft, "-k", "3", "--prompts", str(prompts), "--max-tokens", "24", "--json"]
        monkeypatch.setattr(sys, "argv", ["outrider", "accept", str(model), *asked, *arguments])
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
    (lower,) = read_records(path)
    write_record(path, replace(lower, rates=(1.0, 1.0, 1.0), drafts=10**6))
    code, told, _ = accept("--expect", str(path))
    assert code == 1 and told["passed"] is False and told["departures"][0]["position"] == 1
    write_record(path, lower)
    for flags, message in (
        (("-k", "2"), "'num_speculative_tokens': 2"),
        (("--num-prompts", "2"), "prompts is"),
    ):
        code, told, err = accept("--expect", str(path), *flags)
        assert code == 2 and told["type"] == "OptionError" and message in err and "cannot be compared" in err
    path.write_text("{")
    code, _, err = accept("--expect", str(path))
    assert code == 2 and "acceptance.json" in err


def test_with_a_head_its_own_records_are_held(accept: Callable[..., Any], tmp_path: Path) -> None:
    head = Path(shutil.copytree(tiny_head(True), tmp_path / "head"))
    path = head / "acceptance.json"
    code, told, _ = accept(draft=str(head))
    assert code == 0 and told["passed"] is None and told["expected"] is None and told["not_compared"] == []
    temperatures = ("--temperature", "0", "--temperature", "0.7")
    code, told, _ = accept(*temperatures, "--record", str(path), draft=str(head))
    assert code == 0 and told["passed"] is None and len(read_records(path)) == 2
    assert str(tmp_path) not in path.read_text(), "a record must hold wherever the head is"
    moved = shutil.copytree(head, tmp_path / "elsewhere")
    code, told, _ = accept(*temperatures, draft=str(moved))
    assert code == 0 and told["passed"] is True and told["method"] == "peagle"
    assert [run["temperature"] for run in told["runs"]] == [0.0, 0.7] and told["runs"][0]["rates"] == told["rates"]
    config = json.dumps({"model": str(head), "parallel_drafting": True})
    code, told, _ = accept("--speculative-config", config, draft="eagle3")
    assert code == 0 and told["passed"] is True, "another way to say the same"
    code, told, _ = accept("--temperature", "0.7", "-k", "2", draft=str(head))
    assert code == 0 and told["passed"] is None and "'num_speculative_tokens': 2" in told["not_compared"][0]


def test_each_temperature_is_held_to_its_own_record(accept: Callable[..., Any], tmp_path: Path) -> None:
    path, often = tmp_path / "acceptance.json", ("--speculative-config", '{"prompt_lookup_min": 1}')
    accept("--temperature", "0", "--temperature", "1.5", "--record", str(path), *often)
    greedy, warm = read_records(path)
    assert greedy.rates != warm.rates
    write_record(path, replace(warm, rates=(1.0, 1.0, 1.0), drafts=10**6))
    code, told, _ = accept("--temperature", "0", "--temperature", "1.5", "--expect", str(path), *often)
    assert code == 1 and told["passed"] is False
    assert [run["passed"] for run in told["runs"]] == [True, False]
    assert {departure["temperature"] for departure in told["departures"]} == {1.5} and told["suspect"]
    code, _, err = accept("--temperature", "0", "--temperature", "0.5", "--expect", str(path), *often)
    assert code == 2 and "temperature is 0.5" in err
    code, told, _ = accept("--temperature", "1.5", "--record", str(path), *often)
    assert code == 0 and told["passed"] is None, "what is recorded anew is not held to what it replaces"
    assert read_records(path) == [greedy, warm]


def test_what_cannot_be_recorded(accept: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    made_up = ("--verifier", "synthetic", *(["--synthetic-rates", "0.5"] * 3))
    code, told, err = accept("--record", str(path), *made_up)
    assert code == 2 and "makes acceptance up" in err and not path.exists()
    code, told, err = accept(
        "--record", str(path), "--speculative-config", '{"prompt_lookup_min": 30, "prompt_lookup_max": 30}'
    )
    assert code == 2 and "nothing was drafted" in err and not path.exists()
    path.write_text("[]")
    code, told, err = accept("--record", str(path))
    assert code == 2 and told["type"] == "CheckpointError" and path.read_text() == "[]"


def test_a_run_does_not_depend_on_those_before_it(accept: Callable[..., Any]) -> None:
    _, alone, _ = accept("--temperature", "0.8")
    _, after, _ = accept("--temperature", "0", "--temperature", "0.8")
    assert alone["per_position"] == after["runs"][1]["per_position"]


def test_figures_are_printed(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "abcabcabc"}) + "\n")
    asked = ["--draft", tiny_head(True), "--prompts", str(prompts), "--temperature", "0", "--temperature", "1"]
    monkeypatch.setattr(sys, "argv", ["outrider", "accept", str(tiny("qwen3")), *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert not ended.value.code
    for part in ("peagle, 4 tokens a round, all in one pass", "95 % interval", "temperature 1:", "ratios", "2 to 3"):
        assert part in out


# The bundled P-EAGLE head, run rightly and wrongly.

HEAD = BUNDLED_HEADS / "peagle"

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """`accept` with the bundled head, run by a class of `broken_heads`."""

    def call(drafter: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        head = json.dumps({"model": str(HEAD)})
        command = ["accept", "--draft", f"broken_heads:{drafter}", "--speculative-config", head, "-k", "4"]
        command += ["--kv-cache-memory", str(200 << 20)]
        monkeypatch.setattr(sys, "argv", ["outrider", *command, *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    return call


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Where the healthy head's record on so many prompts is, once there is one."""
    folder = tmp_path_factory.mktemp("records")
    return {count: folder / f"{count}.json" for count in (48, 256)}


# drafter, prompts, first position to fall, cause. A tap one layer off is close to the right one: more prompts show it.
CONTROLS = {
    "one token at a time": ("Sequential", 48, 2, "collapsed: the parallel head is run one token at a time"),
    "masks blind to the context": ("Blind", 48, 2, "collapsed: .*mask rows do not see the context"),
    "stale features": ("Stale", 48, 2, "collapsed: mask rows .* stale features of rejected tokens"),
    "taps off by one": ("TapsOffByOne", 256, None, "every position fell somewhat, .*features one layer off"),
}


def expectation(check: Check, path: Path, *prompts: str) -> tuple[str, ...]:
    if not path.exists():
        code, told = check("Healthy", *prompts, "--record", str(path))
        assert code == 0 and told["method"] == "peagle" and told["head"]
    return (*prompts, "--expect", str(path))


def test_a_healthy_head_passes(check: Check, recorded: dict[int, Path]) -> None:
    asked = expectation(check, recorded[48], "--num-prompts", "48")
    code, told = check("Healthy", *asked)
    assert code == 0 and told["passed"] is True and told["departures"] == []
    assert told["rates"][0] >= 0.675 and told["acceptance_length"] >= 2.33, "vLLM's own figures for P-EAGLE"


@pytest.mark.parametrize(
    "control", [pytest.param(name, marks=[pytest.mark.slow] * (CONTROLS[name][1] > 48)) for name in CONTROLS]
)
def test_a_head_run_wrongly_fails(control: str, check: Check, recorded: dict[int, Path]) -> None:
    drafter, count, first, cause = CONTROLS[control]
    asked = expectation(check, recorded[count], "--num-prompts", str(count))
    code, told = check(drafter, *asked)
    assert code == 1 and told["passed"] is False
    fallen = {departure["position"] for departure in told["departures"] if departure["measured"] < departure["low"]}
    assert fallen and (first is None or min(fallen) == first)
    assert re.search(cause, told["suspect"])


@pytest.mark.parametrize("drafter", ["Healthy", "Sequential"])
def test_the_engine_warns_of_a_head_run_wrongly(
    drafter: str, check: Check, recorded: dict[int, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expectation(check, recorded[48], "--num-prompts", "48")
    head = Path(shutil.copytree(HEAD, tmp_path / "head"))
    shutil.copy(recorded[48], head / "acceptance.json")
    drafting = {"method": f"broken_heads:{drafter}", "model": str(head), "num_speculative_tokens": 4}
    with LLM(speculative_config=drafting, kv_cache_memory=200 << 20) as llm:
        llm.generate(list(read_prompts(HELD_OUT).texts[-64:]), SamplingParams(temperature=0.0, max_tokens=128))
        state = llm.watchdog()
    (watched,) = state.watched
    assert watched.measured.drafts == WINDOW
    told = [record.getMessage() for record in caplog.records if "fell" in record.getMessage()]
    if drafter == "Healthy":
        assert not told and not state.departed
    else:
        assert state.departed and min(departure.position for departure in watched.departures) == 2
        (warning,) = told
        assert "peagle (K=4, temperature 0)" in warning and "run one token at a time" in warning


@pytest.mark.parametrize("count", [160, pytest.param(256, marks=pytest.mark.slow)])
def test_a_prefix_hit_taken_as_it_is_fails(count: int, check: Check, tmp_path: Path) -> None:
    """Whole blocks are shared, and the token after them is not: it is what the last cached row of the head was of.

    That is one row of many, so only what follows such a prefix at once can tell: each prompt goes one token past it,
    and one round is counted. Only with all 256 beginnings is the cause named too.
    """
    tokenizer, texts = Tokenizer(BUNDLED / "model"), []
    beginnings = read_prompts(HELD_OUT).texts[:count]
    for ending, length, text in itertools.product((" self", "\n", "\n\n", "["), (16, 32), beginnings):
        shared = tokenizer.encode(text)[:length]
        longer = tokenizer.wrapped.decode(shared) + ending
        if len(ids := tokenizer.encode(longer)) == length + 1 and ids[:length] == shared:
            texts.append(longer)
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "acceptance.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = expectation(check, path, "--prompts", str(prompts), "--max-tokens", "2")
    code, told = check("NoRerun", *asked)
    assert code == 1 and (count < 256 or "keys that a prefix hit brought" in told["suspect"])
    assert check("NoRerun", *asked, "--no-enable-prefix-caching")[0] == 0, "it is the hits that do it"
