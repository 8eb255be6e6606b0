"""Which runner serves: the first that can, the one that was asked for, or none with every reason."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from checkpoints import Knowing, Right, plugin, prompt
from heads import drafting
from outrider import LLM, OptionError, SamplingParams, UnsupportedError
from outrider import config as config_module
from outrider.capability import Feature, Offer, Part
from outrider.cli.main import main
from outrider.config import Resolved, resolve
from outrider.draft.registry import METHODS
from outrider.layers.backend import ByOps, FusedGpu
from outrider.options import EngineOptions
from outrider.oracle import RefusedError, choose
from outrider.runner.capture import CaptureOptions
from outrider.runner.eager import EagerRunner
from outrider.runner.graph import GraphRunner

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
    assert refused.value.able == ()
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
    assert "runner fast cannot serve" in str(refused.value) and refused.value.able == ("slow",)
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
    with pytest.raises(RefusedError, match="runner fast, from OUTRIDER_RUNNER, cannot serve"):
        LLM(path, speculative_config=plugin(Right))
    monkeypatch.setenv("OUTRIDER_RUNNER", "slwo")
    with pytest.raises(OptionError, match=r"unknown runner: slwo, from OUTRIDER_RUNNER, \(did you mean slow\?\)"):
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
    expected = {"runner": "eager", "method": "ngram", "num_speculative_tokens": 3, "forced": False}
    assert {key: told[key] for key in expected} == expected
    (reason,) = told["passed_over"]
    assert reason == {
        "runner": "graph",
        "part": "device cpu",
        "feature": "cpu",
        "reason": GraphRunner.offer.lacks[Feature.CPU],
    }
    memory = told["memory"]
    assert memory["programs"] == 0
    assert memory["num_tokens"] == memory["num_blocks"] * memory["block_size"]
    assert memory["cache"] == memory["num_blocks"] * memory["bytes_per_block"] and memory["weights"] > 0
    assert "refused" not in told


@pytest.mark.parametrize(
    ("backend", "said"), [("uni", "in the engine's own process"), ("mp", "in a process of its own")]
)
def test_explain_says_what_hosts_the_runner(explain: Any, backend: str, said: str) -> None:
    flags = ("--distributed-executor-backend", backend)
    assert json.loads(explain(*flags, "--json")[1])["distributed_executor_backend"] == backend
    assert said in " ".join(explain(*flags)[1].split())


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
    found = [(refused["runner"], refused["part"], refused["feature"]) for refused in told["refused"]]
    assert found == [
        ("graph", "device cpu", "cpu"),
        ("graph", "tensor_parallel_size=2", "tensor"),
        ("eager", "tensor_parallel_size=2", "tensor"),
    ]
    assert "leave it at 1" in told["refused"][-1]["reason"] and told["able"] == []
    assert told["method"] == "ngram" and told["device"] == "cpu", "the configuration stands beside the reasons"


def test_explain_of_a_runner_that_cannot(explain: Any) -> None:
    code, out, _ = explain("--draft", "ngram", "--runner", "graph", "--json")
    told = json.loads(out)
    assert code == 2 and told["able"] == ["eager"] and told["method"] == "ngram"
    assert [(refused["runner"], refused["feature"]) for refused in told["refused"]] == [("graph", "cpu")]
    code, _, err = explain("--draft", "ngram", "--runner", "graph")
    assert code == 2 and "runner graph cannot serve this configuration" in err
    assert (
        "runner graph: device cpu: a CPU has no CUDA graphs" in err and "runner eager lacks nothing: ask for it" in err
    )
    code, _, err = explain("--runner", "graph", "--tensor-parallel-size", "2")
    assert code == 2 and "no runner serves" in err and err.count("tensor_parallel_size=2 needs tensor") == 2


def test_what_no_runner_serves_is_refused_for_that_and_not_for_want_of_memory(explain: Any) -> None:
    no_room = ("--kv-cache-memory", "1")
    code, out, _ = explain("--tensor-parallel-size", "2", *no_room, "--json")
    assert code == 2 and {refused["feature"] for refused in json.loads(out)["refused"]} == {"cpu", "tensor"}
    code, out, _ = explain(*no_room, "--json")
    assert code == 2 and json.loads(out)["type"] == "CapacityError"


def test_explain_for_people(explain: Any, two_runners: None) -> None:
    code, out, _ = explain("--draft", "checkpoints:Right")
    assert code == 0 and "runner slow" in out and "not fast: drafter right needs host_code" in out
    code, _, err = explain("--pipeline-parallel-size", "2", "--runner", "slow")
    assert code == 2 and "error:" in err and "runner slow: pipeline_parallel_size=2 needs pipeline" in err
    code, _, err = explain("--runner", "eagre")
    assert code == 2 and "unknown runner: eagre" in err


# A GPU, as torch would tell of it: nothing is loaded, so none is needed.


def on_gpu(path: str, **options: Any) -> Resolved:
    return resolve(EngineOptions.from_kwargs(model=path, max_model_len=64, **options))


def why_not(resolved: Resolved, runner: str = "graph") -> list[tuple[str, Feature]]:
    """Parts and features for which a runner was passed over."""
    passed_over = resolved.served_by().passed_over
    return [(gap.part, gap.feature) for entry in passed_over if entry.runner == runner for gap in entry.gaps]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_is_served_by_the_graph_runner(
    family: str, method: str, tiny: Callable[..., Path], fake_gpu: Callable[..., None]
) -> None:
    fake_gpu()
    choice = on_gpu(str(tiny(family)), speculative_config=drafting(method)).served_by()
    assert choice.runner is GraphRunner and not choice.passed_over and not choice.forced


def test_explain_of_a_gpu_tells_the_memory_plan(explain: Any, fake_gpu: Callable[..., None]) -> None:
    fake_gpu()
    code, out, _ = explain("--draft", "ngram", "-k", "3", "--max-num-seqs", "8")
    assert code == 0 and "runner graph, the fastest" in out
    for said in ("weights", "workspace, at most", "for 6 batch sizes, to 8 rows", "32 blocks, 512 tokens"):
        assert said in out
    capture = CaptureOptions((1, 2, 3, 4, 6, 8), (3,))
    code, out, _ = explain("--draft", "ngram", "-k", "3", "--max-num-seqs", "8", "--json")
    assert code == 0 and json.loads(out)["memory"]["programs"] == GraphRunner.footprint(capture)


def test_plain_python_on_a_gpu_is_served_by_the_eager_runner(
    path: str, fake_gpu: Callable[..., None], explain: Any
) -> None:
    fake_gpu()
    resolved = on_gpu(path, speculative_config=plugin(Right))
    assert resolved.served_by().runner is EagerRunner
    assert why_not(resolved) == [("drafter right", Feature.HOST_CODE)]
    code, out, _ = explain("--draft", "checkpoints:Right")
    assert code == 0 and "runner eager" in out
    assert "not graph: drafter right needs host_code: a recorded step has no Python in it" in out
    code, out, _ = explain("--draft", "checkpoints:Right", "--runner", "graph", "--json")
    told = json.loads(out)
    assert code == 2 and told["device"] == "cuda" and told["able"] == ["eager"]


@pytest.mark.parametrize(
    ("capability", "triton", "features", "part"),
    [
        ((9, 0), False, [Feature.WITHOUT_TRITON], "device cuda"),
        ((7, 5), True, [Feature.OLD_CUDA], "device cuda of compute capability 7.5"),
        ((7, 5), False, [Feature.OLD_CUDA, Feature.WITHOUT_TRITON], "device cuda of compute capability 7.5"),
        ((8, 0), True, [], ""),
    ],
    ids=["no-triton", "old", "old-no-triton", "oldest-served"],
)
def test_a_gpu_without_kernels_is_served_by_the_eager_runner(
    capability: tuple[int, int],
    triton: bool,
    features: list[Feature],
    part: str,
    path: str,
    fake_gpu: Callable[..., None],
) -> None:
    fake_gpu(capability=capability, triton=triton)
    resolved = on_gpu(path)
    assert resolved.served_by().runner is (EagerRunner if features else GraphRunner)
    assert why_not(resolved) == [(part, feature) for feature in features]
    layers = resolved.served_by().layers
    assert layers is not None and layers.backend is (ByOps if features else FusedGpu)
    assert [gap.feature for _, gap in layers.passed_over] == features[-1:]
    if features:
        with pytest.raises(RefusedError, match="runner eager lacks nothing") as refused:
            on_gpu(path, runner="graph").served_by()
        assert all(remedy in str(refused.value) for remedy in ("take", "eager runner"))
        assert ("pip install triton" in str(refused.value)) == (not triton)


def test_a_gpu_is_looked_at_only_where_it_is_served(
    path: str, fake_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: Any) -> Any:
        raise AssertionError("the device was asked")

    fake_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", touched)
    monkeypatch.setattr(torch.cuda, "mem_get_info", touched)
    assert on_gpu(path, device="cpu").served_by().runner is EagerRunner
    with pytest.raises(AssertionError, match="was asked"):
        on_gpu(path)


def test_no_such_gpu(path: str, fake_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu()
    with pytest.raises(OptionError, match=r"no such device: cuda:1; torch sees 1 CUDA devices: .*auto or cpu"):
        on_gpu(path, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError, match="no such device: cuda; torch sees 0 CUDA devices"):
        on_gpu(path, device="cuda")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([], "have no recorded program"), ([0, 4], "from 1"), ([1, 2], "add 4"), ([1, 8], "max_num_seqs 4")],
)
def test_sizes_to_record_must_hold_every_step(
    path: str, fake_gpu: Callable[..., None], sizes: list[int], said: str
) -> None:
    fake_gpu()
    assert on_gpu(path, max_num_seqs=4, capture_sizes=[4, 1, 4]).runner.capture.sizes == (1, 4)
    with pytest.raises(OptionError, match=f"capture_sizes .*{said}"):
        on_gpu(path, max_num_seqs=4, capture_sizes=sizes)


@pytest.mark.parametrize("most", [1, 2, 5, 64, 100, 128])
def test_sizes_that_nobody_gave_waste_at_most_a_third_of_a_step(path: str, most: int) -> None:
    sizes = on_gpu(path, device="cpu", max_num_seqs=most).runner.capture.sizes
    assert sizes[0] == 1 and sizes[-1] == most and list(sizes) == sorted(set(sizes))
    assert all(2 * after <= 3 * before or after - before == 1 for before, after in itertools.pairwise(sizes))
