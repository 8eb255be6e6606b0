"""A user's own logits processor with state: the same tokens with drafts and without, on both runners."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from checkpoints import Case, run
from emulated import Emulated
from heads import drafting
from outrider import LLM, LogitsProcessor, OptionError, SamplingError, SamplingParams
from outrider import config as config_module
from outrider.config import resolve
from outrider.core.plan import Admission
from outrider.options import EngineOptions
from outrider.processing import SamplingField, Slots, State, StepBatch, Verdict
from outrider.runner.eager import EagerRunner
from outrider.verify.registry import build_processors

ROOT = Path(__file__).parents[3]
OWN = ["no_repeat:NoRepeat"]
RUNNERS = pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=["eager", "graph"])


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setitem(sys.modules, "own_processors", sys.modules[__name__])


def cases(penalty: float = 6.0) -> list[Case]:
    """Requests that want the processor, some with others, beside ones that do not want it."""
    wants = {"extra_args": {"no_repeat": penalty}}
    return [
        Case.of(5, 1, temperature=0.0, max_tokens=40, **wants),
        Case.of(9, 2, temperature=0.0, max_tokens=30),
        Case.of(17, 3, temperature=0.8, top_k=20, max_tokens=40, **wants),
        Case.of(7, 4, temperature=0.0, max_tokens=24, extra_args={"no_repeat": 0.5}),
        Case.of(12, 5, temperature=1.0, max_tokens=24),
        Case.of(21, 6, temperature=0.0, min_tokens=8, max_tokens=40, **wants),
    ]


def tokens(path: Path, work: list[Case], **options: Any) -> list[Any]:
    with LLM(str(path), device="cpu", max_model_len=96, logits_processors=OWN, **options) as llm:
        found = run(llm, work)
        llm.engine._scheduler.check_idle()
        return found


WAYS: dict[str, dict[str, Any]] = {
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    "peagle": {"speculative_config": drafting("peagle", 3)},
    "eagle3, two slots": {"speculative_config": drafting("eagle3", 2), "max_num_seqs": 2},
    "preempted": {
        "speculative_config": drafting("peagle", 3),
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "kv_cache_memory": "few blocks",
    },
}


@RUNNERS
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_same_with_drafts_and_without(
    way: str, runner: type[Any], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("qwen3")
    alone = [tokens(path, [case], max_num_seqs=1)[0] for case in cases()]
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    options = dict(WAYS[way])
    if options.get("kv_cache_memory") is not None:
        plan = resolve(
            EngineOptions(model=str(path), max_model_len=96, speculative_config=options["speculative_config"])
        )
        options["kv_cache_memory"] = 8 * plan.runner.memory.bytes_per_block
    with LLM(str(path), device="cpu", max_model_len=96, logits_processors=OWN, **options) as llm:
        for order in (1, -1):  # slots are taken over from requests that want it and from ones that do not
            assert run(llm, cases()[::order]) == alone[::order]
        assert bool(llm.engine.stats().num_preemptions) == (way == "preempted")
    assert alone != [tokens(path, [case], max_num_seqs=1)[0] for case in cases(0.0)], "the penalty changes texts"


@RUNNERS
def test_the_penalty_is_what_it_says(
    runner: type[Any], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty above all differences of logits leaves no token twice while there are others."""
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    with LLM(
        str(tiny("qwen3")),
        device="cpu",
        max_model_len=96,
        logits_processors=OWN,
        speculative_config=drafting("peagle", 3),
    ) as llm:
        for penalty, most in ((100.0, 1), (0.0, 2)):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=60, ignore_eos=True, extra_args={"no_repeat": penalty}
            )
            (out,) = llm.generate([[1, 2, 3]], sampling)
            counts = Counter(out.outputs[0].token_ids)
            assert (max(counts.values()) == 1) == (most == 1)


class Hasty(LogitsProcessor):
    """Counts drafts that nobody has accepted: what `commit` is there to prevent."""

    name: ClassVar[str] = "hasty"

    def __init__(self) -> None:
        from no_repeat import NoRepeat

        self.right = NoRepeat()
        type(self).fields, type(self).tables = self.right.fields, self.right.tables

    def admit(self, admission: Admission) -> Any:
        return self.right.admit(admission)

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        return self.right(logits, batch, slots, state)

    def commit(self, batch: StepBatch, verdict: Verdict, state: State) -> None:
        every = torch.cat([batch.draft_tokens, verdict.tokens[:, :1].clamp(min=0)], dim=1)
        slot = batch.slot[:, None].expand_as(every)
        state["counts"].index_put_((slot, every), torch.ones_like(every).int(), accumulate=True)


def test_counting_drafts_that_fell_is_noticed(tiny: Callable[..., Path]) -> None:
    path = tiny("qwen3")
    expected = tokens(path, cases())
    with LLM(
        str(path),
        max_model_len=96,
        logits_processors=["own_processors:Hasty"],
        speculative_config=drafting("peagle", 3),
    ) as llm:
        assert run(llm, cases()) != expected


def test_the_memory_plan_counts_its_tables_and_copies(tiny: Callable[..., Path]) -> None:
    path, plans = tiny("qwen3"), []
    for own in (None, OWN):
        options = EngineOptions(model=str(path), device="cpu", max_num_seqs=8, max_model_len=64, logits_processors=own)
        plans.append(resolve(options).runner.memory.workspace)
    vocab_size = resolve(EngineOptions(model=str(path))).runner.model_config.vocab_size
    assert plans[1] - plans[0] == 9 * (vocab_size + 1) * 4 + 2 * 8 * vocab_size * 4


def test_parameters_that_no_processor_declares_are_refused(tiny: Callable[..., Path]) -> None:
    def add(llm: LLM, **extra: Any) -> None:
        llm.engine.add("a", [1, 2], SamplingParams(extra_args=extra))

    none = r"no logits processor reads no_repeat .*logits_processors names none"
    with LLM(str(tiny("qwen3")), max_model_len=64) as llm, pytest.raises(SamplingError, match=none):
        add(llm, no_repeat=1.0)
    with LLM(str(tiny("qwen3")), max_model_len=64, logits_processors=OWN) as llm:
        with pytest.raises(SamplingError, match=r"no logits processor reads no_repaet .*did you mean no_repeat"):
            add(llm, no_repaet=1.0)
        for wrong in (-1.0, 101, "much", None, True):
            with pytest.raises(SamplingError, match=r"no_repeat must be a number in \[0, 100\]"):
                add(llm, no_repeat=wrong)
        add(llm, no_repeat=2)
        assert not llm.watchdog().watched
    for wrong in ([1], "ab", {1: 2}):
        with pytest.raises(SamplingError, match="extra_args must map names to values"):
            SamplingParams(extra_args=wrong)  # type: ignore[arg-type]


class Twin(LogitsProcessor):
    """Has the name of another."""

    name: ClassVar[str] = "temperature"

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        return logits


class Greedy(Twin):
    """Declares a parameter that is another's."""

    name: ClassVar[str] = "greedy"
    fields: ClassVar[tuple[SamplingField, ...]] = (SamplingField("top_k", int, 0, "mine"),)


def test_a_processor_that_cannot_be_had_is_refused() -> None:
    for name, said in (
        ("no_repeat", "give module:Class"),
        ("no_such_module:Mine", "cannot import logits processor"),
        ("no_repeat:Counter", "must be a subclass of outrider.LogitsProcessor"),
        ("own_processors:Twin", "temperature has the name of another"),
        ("own_processors:Greedy", "greedy declares top_k, which another reads"),
    ):
        with pytest.raises(OptionError, match=said):
            build_processors([name])
    order = [processor.name for processor in build_processors(OWN)]
    assert order == ["min_tokens", "no_repeat", "temperature", "truncation"]
