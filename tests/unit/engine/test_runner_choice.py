"""Which runner serves: the first that can, the one that was asked for, or none with every reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from checkpoints import Knowing, Right, plugin, prompt
from outrider import LLM, OptionError, SamplingParams, UnsupportedError
from outrider import config as config_module
from outrider.capability import Feature, Offer, Part
from outrider.cli.main import main
from outrider.oracle import RefusedError, choose
from outrider.runner.eager import EagerRunner

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


def offer(*lacking: Feature) -> Offer:
    return Offer(
        frozenset(Feature) - set(lacking), {one: f"no {one.name.lower()} here; go elsewhere" for one in lacking}
    )


class Fast(EagerRunner):
    name: ClassVar[str] = "fast"
    offer: ClassVar[Offer] = offer(Feature.HOST_CODE, Feature.CPU, Feature.PIPELINE)


class Slow(EagerRunner):
    name: ClassVar[str] = "slow"
    offer: ClassVar[Offer] = offer(Feature.TENSOR, Feature.PIPELINE)


BOTH = (Fast, Slow)
MODEL = Part("a model")
HOST = Part("drafter mine", frozenset({Feature.HOST_CODE, Feature.CPU}))
SPLIT = Part("tensor_parallel_size=2", frozenset({Feature.TENSOR}))
STAGES = Part("pipeline_parallel_size=2", frozenset({Feature.PIPELINE}))


def test_the_first_that_can() -> None:
    choice = choose(BOTH, [MODEL, SPLIT])
    assert (choice.runner, choice.passed_over, choice.forced) == (Fast, (), False)


def test_the_next_with_the_reasons_of_those_before() -> None:
    choice = choose(BOTH, [MODEL, HOST])
    assert choice.runner is Slow
    assert choice.to_dict()["passed_over"] == [
        {"runner": "fast", "part": "drafter mine", "feature": "cpu", "reason": "no cpu here; go elsewhere"},
        {"runner": "fast", "part": "drafter mine", "feature": "host_code", "reason": "no host_code here; go elsewhere"},
    ]


def test_the_one_asked_for() -> None:
    choice = choose(BOTH, [MODEL], "slow")
    assert (choice.runner, choice.passed_over, choice.forced) == (Slow, (), True)
    assert choose(BOTH, [SPLIT], "fast").runner is Fast


def test_none_with_every_reason_of_every_runner() -> None:
    with pytest.raises(RefusedError) as refused:
        choose(BOTH, [MODEL, HOST, SPLIT, STAGES])
    found = [(entry["runner"], entry["part"], entry["feature"]) for entry in refused.value.to_list()]
    assert found == [
        ("fast", "drafter mine", "cpu"),
        ("fast", "drafter mine", "host_code"),
        ("fast", "pipeline_parallel_size=2", "pipeline"),
        ("slow", "tensor_parallel_size=2", "tensor"),
        ("slow", "pipeline_parallel_size=2", "pipeline"),
    ]
    message = str(refused.value)
    assert message.count("\n") == 5 and all(f"runner {runner}: {part}" in message for runner, part, _ in found)
    assert isinstance(refused.value, UnsupportedError)


def test_the_one_asked_for_cannot() -> None:
    # nothing takes its place, though the other could
    with pytest.raises(RefusedError) as refused:
        choose(BOTH, [HOST], "fast")
    assert {entry["runner"] for entry in refused.value.to_list()} == {"fast"}
    with pytest.raises(RefusedError) as refused:
        choose(BOTH, [HOST, SPLIT], "slow")
    assert {entry["runner"] for entry in refused.value.to_list()} == {"fast", "slow"}, "all runners' reasons at once"


def test_no_such_runner() -> None:
    with pytest.raises(OptionError, match=r"unknown runner: fats \(did you mean fast\?\)"):
        choose(BOTH, [MODEL], "fats")


@pytest.fixture
def path(tiny: Callable[..., Path]) -> str:
    return str(tiny("qwen3"))


@pytest.fixture
def two_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "RUNNERS", BOTH)
    monkeypatch.setattr(Fast, "offer", offer(Feature.HOST_CODE))


def test_an_engine_falls_back_and_says_so(path: str, two_runners: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=5, detokenize=False)
    with LLM(path, speculative_config=NGRAM) as llm:
        assert llm.choice.runner is Fast
        expected = llm.generate(prompt(9), sampling)[0].outputs[0].token_ids
    monkeypatch.setattr(Knowing, "known", [[*prompt(9), *expected]])
    with LLM(path, speculative_config=plugin(Right)) as llm:
        assert llm.choice.runner is Slow and str(llm.choice.passed_over[0].gaps[0]).startswith("drafter right needs")
        assert llm.generate(prompt(9), sampling)[0].outputs[0].token_ids == expected
        assert llm.acceptance().accepted > 0
    with pytest.raises(RefusedError, match="runner fast: drafter right needs host_code: no host_code here"):
        LLM(path, speculative_config=plugin(Right), runner="fast")


def test_the_environment_chooses_unless_the_option_does(
    path: str, two_runners: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_RUNNER", "slow")
    with LLM(path) as llm:
        assert llm.choice.runner is Slow and llm.choice.forced
    with LLM(path, runner="fast") as llm:
        assert llm.choice.runner is Fast
    monkeypatch.setenv("OUTRIDER_RUNNER", "fast")
    with pytest.raises(RefusedError, match="runner fast"):
        LLM(path, speculative_config=plugin(Right))
    monkeypatch.setenv("OUTRIDER_RUNNER", "slwo")
    with pytest.raises(OptionError, match=r"unknown runner: slwo .*slow"):
        LLM(path)
    monkeypatch.setenv("OUTRIDER_RUNNER", "")
    with LLM(path) as llm:
        assert llm.choice.runner is Fast


@pytest.fixture
def explain(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", "explain", path, "--max-model-len", "64", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def test_explain_json(explain: Any) -> None:
    code, out, _ = explain("--draft", "ngram", "-k", "3", "--json")
    told = json.loads(out)
    assert code == 0
    expected = {"runner": "eager", "method": "ngram", "num_speculative_tokens": 3, "passed_over": [], "forced": False}
    assert {key: told[key] for key in expected} == expected
    memory = told["memory"]
    assert memory["num_tokens"] == memory["num_blocks"] * memory["block_size"]
    assert memory["cache"] == memory["num_blocks"] * memory["bytes_per_block"] and memory["weights"] > 0
    assert "refused" not in told


def test_explain_json_of_a_fallback(explain: Any, two_runners: None) -> None:
    code, out, _ = explain("--draft", "checkpoints:Right", "--json")
    told = json.loads(out)
    assert (code, told["runner"], told["method"]) == (0, "slow", "right")
    reason = {"part": "drafter right", "feature": "host_code", "reason": "no host_code here; go elsewhere"}
    assert told["passed_over"] == [{"runner": "fast", **reason}]


def test_explain_json_of_a_refusal(explain: Any) -> None:
    code, out, _ = explain("--tensor-parallel-size", "2", "--json")
    told = json.loads(out)
    assert code == 2 and "runner" not in told
    (refused,) = told["refused"]
    assert {key: refused[key] for key in ("runner", "part", "feature")} == {
        "runner": "eager",
        "part": "tensor_parallel_size=2",
        "feature": "tensor",
    }
    assert "leave it at 1" in refused["reason"]


def test_explain_for_people(explain: Any, two_runners: None) -> None:
    code, out, _ = explain("--draft", "checkpoints:Right")
    assert code == 0 and "runner slow" in out and "not fast: drafter right needs host_code" in out
    code, _, err = explain("--pipeline-parallel-size", "2", "--runner", "slow")
    assert code == 2 and "error:" in err and "runner slow: pipeline_parallel_size=2 needs pipeline" in err
    code, _, err = explain("--runner", "eagre")
    assert code == 2 and "unknown runner: eagre" in err
