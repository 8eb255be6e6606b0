"""The promises again on a CUDA device, against the CPU and against transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from checkpoints import SIZES, cache_bytes, run
from heads import NUM_LAYERS as HEAD_LAYERS
from heads import drafting, tiny_head
from outrider import LLM, DraftContext, SamplingParams
from outrider.core.plan import StepPlan
from outrider.draft.eagle.base import HeadDrafter
from outrider.draft.registry import METHODS
from outrider.errors import EngineDeadError
from outrider.runner.graph import GraphPending, GraphRunner
from outrider.runner.registry import RUNNERS
from outrider.tensors import Draft
from spoilers import GOOD, check_spoilt_beside_good, completions
from workloads import drive, random_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [[int(token) for token in torch.randint(256, (length,), generator=torch.Generator().manual_seed(length))]
           for length in (3, 17, 50, 120)]  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False),
    "sampled": SamplingParams(
        temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=5, max_tokens=40, detokenize=False
    ),
}


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def tokens(path: Path, sampling: SamplingParams, **options: Any) -> list[list[int]]:
    with LLM(str(path), max_num_seqs=8, kv_cache_memory=1 << 24, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, sampling)]


@pytest.mark.parametrize("family", sorted(checkpoints.FAMILIES))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner.name)
def test_same_tokens_as_on_the_cpu(
    tiny: Callable[..., Path], runner: type[Any], family: str, sampling: str, method: str
) -> None:
    path, params = tiny(family), SAMPLINGS[sampling]
    given = {"speculative_config": drafting(method, 4), "max_num_batched_tokens": 64, "runner": runner.name}
    assert tokens(path, params, device="cuda", **given) == tokens(path, params, device="cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [2, 3])
def test_runners_agree_on_random_workloads(tiny: Callable[..., Path], method: str, seed: int) -> None:
    """Arrivals, aborts, preemptions and prefix hits: what runs to its end is the same on both."""
    path, cases = tiny("qwen3"), random_cases(40, seed)
    found = {}
    for runner in RUNNERS:
        options = {"max_model_len": 96, "max_num_seqs": 6, "max_num_batched_tokens": 40, "dtype": "float32"}
        layers = SIZES["num_hidden_layers"] + (HEAD_LAYERS if issubclass(METHODS[method], HeadDrafter) else 0)
        tight = cache_bytes(6, num_hidden_layers=layers)
        with LLM(
            str(path),
            device="cuda",
            runner=runner.name,
            speculative_config=drafting(method, 4),
            kv_cache_memory=tight,
            **options,
        ) as llm:
            found[runner.name] = drive(llm, cases, seed)
            stats = llm.engine.stats()
            assert stats.num_preemptions and stats.prefix_hits and found[runner.name][1], "what it is for"
    (ours, dropped), (theirs, also_dropped) = found.values()
    both = [number for number in ours if number not in dropped | also_dropped]
    assert len(both) > 20 and all(ours[number] == theirs[number] for number in both)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("none", "ngram")])
def test_runners_accept_alike_at_every_position(method: str) -> None:
    """The bundled heads, in float32: the same tokens, and the same drafts accepted."""
    reports, texts = [], []
    prompts = ["def main():\n", "import os\n", "class Stack:\n    def push(", "for i in range("]
    for runner in RUNNERS:
        config = {"method": method, "num_speculative_tokens": 5}
        with LLM(device="cuda", dtype="float32", runner=runner.name, speculative_config=config) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True))
            texts.append([output.outputs[0].token_ids for output in outputs])
            reports.append(llm.acceptance())
    assert texts[0] == texts[1]
    assert reports[0] == reports[1] and reports[0].length > 2


@pytest.mark.parametrize("runner", [runner.name for runner in RUNNERS])
def test_a_worker_in_another_process_gives_the_same(tiny: Callable[..., Path], runner: str) -> None:
    path, cases = tiny("qwen3"), random_cases(12, 5)
    found = []
    for backend in ("uni", "mp"):
        options = {"max_model_len": 96, "max_num_seqs": 6, "kv_cache_memory": 1 << 26, "dtype": "float32"}
        with LLM(
            str(path),
            device="cuda",
            runner=runner,
            speculative_config=drafting("peagle", 4),
            distributed_executor_backend=backend,
            **options,
        ) as llm:
            found.append(run(llm, cases))
            assert llm.engine.worker_stats().memory > 0
    assert found[0] == found[1]


def step_without_waiting(llm: LLM, num_steps: int, arriving: list[int] | None = None) -> None:
    """Steps in which torch raises for what waits for the device, but for an older step.

    All are past every prompt, but for one that is given: it arrives when the others decode.
    """
    for number in range(3):
        llm.engine.add(str(number), PROMPTS[number], SAMPLINGS["sampled" if number == 1 else "greedy"])
    for _ in range(4):
        llm.engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if arriving is not None:
            llm.engine.add("arriving", arriving, SAMPLINGS["sampled"])
        for _ in range(num_steps):
            llm.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for name in ("0", "1", "2", "arriving"):
            llm.engine.abort(name)
    while llm.engine.has_work:
        llm.engine.step()


@pytest.mark.parametrize("method", METHODS)
def test_the_decode_loop_never_waits_for_the_device(tiny: Callable[..., Path], method: str) -> None:
    with LLM(
        str(tiny("qwen3")), device="cuda", runner="graph", speculative_config=drafting(method, 2), max_num_seqs=4
    ) as llm:
        step_without_waiting(llm, 6)


def test_a_decode_loop_that_waits_is_noticed(tiny: Callable[..., Path]) -> None:
    with (
        LLM(str(tiny("qwen3")), device="cuda", runner="eager", max_num_seqs=4) as llm,
        pytest.raises(Exception, match="synchroniz"),
    ):
        step_without_waiting(llm, 6)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_beside_decodes_does_not_wait_for_the_device(
    tiny: Callable[..., Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the step that admits it, nor those of its chunks, nor the one that draws its first token."""
    plans: list[StepPlan] = []
    submit = GraphRunner.submit

    def look(runner: GraphRunner, plan: StepPlan) -> GraphPending:
        plans.append(plan)
        return submit(runner, plan)

    monkeypatch.setattr(GraphRunner, "submit", look)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_prefill_tokens_beside_decodes": 40}
    with LLM(
        str(tiny("qwen3")), device="cuda", runner="graph", speculative_config=drafting(method, 2), **options
    ) as llm:
        step_without_waiting(llm, 8, PROMPTS[3])
    first = next(number for number, plan in enumerate(plans) if any(len(one.tokens) == 120 for one in plan.admit))
    prompt_rows = [row for plan in plans[first : first + 3] for row in plan.rows if row.num_tokens == 40]
    assert [row.ends_prompt for row in prompt_rows] == [False, False, True]
    assert all(len(plan.rows) > 1 for plan in plans[first : first + 3]), "others decode beside it"


def test_a_prompt_step_that_waits_is_noticed(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    call = GraphRunner._call

    def waits(runner: GraphRunner, *given: Any) -> torch.Tensor:
        out = call(runner, *given)
        out.cpu()
        return out

    monkeypatch.setattr(GraphRunner, "_call", waits)
    with LLM(str(tiny("qwen3")), device="cuda", runner="graph", max_num_seqs=4) as llm:
        step_without_waiting(llm, 6)
        with pytest.raises(EngineDeadError, match="synchroniz"):
            step_without_waiting(llm, 6, PROMPTS[3])


@pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1,
    reason="what is taken is told by the device, of all processes together: run it without others, as make gpu does",
)
def test_programs_take_the_memory_that_was_planned(tiny: Callable[..., Path]) -> None:
    with LLM(str(tiny("qwen3")), device="cuda", runner="graph", max_num_seqs=8) as llm:
        runner = llm.engine._worker._runner
        plan = llm.engine.resolved.runner.memory
        assert 0 < runner._programs.bytes <= plan.programs + plan.workspace  # type: ignore[union-attr]


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_a_head_drafts_the_same_as_on_the_cpu(tiny: Callable[..., Path], parallel: bool) -> None:
    """The same rounds with the same verdicts, which only the same drafts give; most fall, so rates are forced."""
    config = {"model": tiny_head(parallel), "num_speculative_tokens": 4}
    drafts: dict[str, list[list[list[int]]]] = {"cpu": [], "cuda": []}
    for device, found in drafts.items():
        forced = {"verifier": "synthetic", "synthetic_rates": [0.8, 0.6, 0.5, 0.4]}
        forced["runner"] = "eager"  # a recorded program cannot be looked into
        with LLM(str(tiny("qwen3")), device=device, speculative_config=config, max_num_seqs=8, **forced) as llm:
            drafter = checkpoints.program(llm)._drafter
            propose = drafter.propose

            def look(
                context: DraftContext,
                propose: Callable[[DraftContext], Draft] = propose,
                found: list[list[list[int]]] = found,
            ) -> Draft:
                draft = propose(context)
                found.append(draft.tokens[draft.length > 0].tolist())
                return draft

            drafter.propose = look  # type: ignore[method-assign]
            llm.generate(PROMPTS, SAMPLINGS["greedy"])
    assert drafts["cpu"] == drafts["cuda"]


def test_bfloat16_and_memory_planned_from_the_device(tiny: Callable[..., Path]) -> None:
    with LLM(str(tiny("qwen3")), device="cuda", dtype="bfloat16", speculative_config=NGRAM) as llm:
        outputs = llm.generate(PROMPTS, SAMPLINGS["greedy"])
        assert all(len(output.outputs[0].token_ids) == 40 for output in outputs)
        assert llm.engine.resolved.runner.memory.num_tokens >= 256


def test_bundled_model_writes_the_same_text_with_drafts() -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=64)
    texts = []
    for config in (None, NGRAM):
        with LLM(device="cuda", dtype="float32", speculative_config=config) as llm:
            texts.append(
                [output.outputs[0].text for output in llm.generate(["def main():\n", "import os\n"], sampling)]
            )
    assert texts[0] == texts[1]


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner.name)
@pytest.mark.parametrize("method", ["none", "ngram", "peagle", "eagle3"])
@pytest.mark.parametrize("spoiler", ["nan", "inf", "masked"])
def test_invalid_logits_end_their_request_alone(
    tiny: Callable[..., Path], runner: type[Any], method: str, spoiler: str
) -> None:
    """As on a CPU, where the tokens of the good requests are taken from."""
    path = tiny("qwen3")
    with LLM(str(path), device="cpu") as llm:
        good = [one.token_ids for one in completions(llm, GOOD * 2)]
    options: dict[str, Any] = {"speculative_config": drafting(method, 3)} if method != "none" else {}
    given = {**options, "runner": runner.name, "device": "cuda", "kv_cache_memory": 1 << 24}
    check_spoilt_beside_good(path, good, spoiler, **given)
