"""Speculation changes speed and nothing else: what a request yields is a function of the request alone.

Each case is run alone, without drafts, prefix caching or any other request: that is the reference.
Whatever is drafted, batched, chunked, shared or preempted, all completions must be equal to it:
tokens, text, and why they ended. The last tests break the verifier: the same comparison must fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import (
    SIZES,
    Case,
    Knowing,
    Result,
    Right,
    Sometimes,
    Wrong,
    cache_bytes,
    plugin,
    program,
    prompt,
    run,
)
from heads import NUM_LAYERS as HEAD_LAYERS
from heads import drafting as head_drafting
from outrider import LLM, SamplingParams
from outrider.kernels.accept_drafts import ACCEPT_DRAFTS
from outrider.tensors import Draft, Slots, StepBatch, Verdict
from outrider.verify.exact import Exact

MAX_LEN = 96

CASES = [
    Case.of(1, 1, temperature=0.0),
    Case.of(13, 2, temperature=0.0, max_tokens=40),
    Case.of(48, 3, temperature=0.0, min_tokens=9, stop_token_ids=list(range(0, 240, 16))),
    Case.of(14, 4, temperature=0.7, max_tokens=40),
    Case.of(14, 4, temperature=0.7, max_tokens=40, seed=2**63 - 1),
    Case.of(33, 5, temperature=1.0, top_k=5),
    Case.of(6, 6, temperature=1.0, top_p=0.6, n=3),
    Case.of(15, 7, temperature=0.7, min_p=0.1, max_tokens=40),
    Case.of(7, 8, temperature=0.4, top_k=40, top_p=0.9, min_p=0.02, max_tokens=30),
    Case.of(21, 9, temperature=1.0, min_tokens=5, stop_token_ids=list(range(1, 240, 16))),
    Case.of(94, 10, temperature=1.0, max_tokens=None),
    Case([*prompt(32, 11), 3], SamplingParams(temperature=0.5, seed=11, max_tokens=20, detokenize=False)),
    Case([*prompt(32, 11), 4], SamplingParams(temperature=0.5, seed=11, max_tokens=20, stop=[], detokenize=True)),
]

NGRAM = {"method": "ngram", "prompt_lookup_min": 1}
SMALL = {"max_num_batched_tokens": 9, "max_num_seqs": 5}
TIGHT = {"kv_cache_memory": cache_bytes(6)}
TIGHT_WITH_HEAD = {"kv_cache_memory": cache_bytes(6, num_hidden_layers=SIZES["num_hidden_layers"] + HEAD_LAYERS)}
OTHER_PROCESS = {"distributed_executor_backend": "mp"}
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": SMALL,
    "preempted": TIGHT,
    "no-prefixes": {"enable_prefix_caching": False},
    "ngram-1": {"speculative_config": {**NGRAM, "num_speculative_tokens": 1}},
    "ngram-4": {"speculative_config": {**NGRAM, "num_speculative_tokens": 4}},
    "ngram-9": {"speculative_config": {**NGRAM, "num_speculative_tokens": 9, "prompt_lookup_max": 2}},
    "ngram-chunked": {"speculative_config": {**NGRAM, "num_speculative_tokens": 7}, **SMALL},
    "ngram-preempted": {"speculative_config": {**NGRAM, "num_speculative_tokens": 4}, **TIGHT},
    "sometimes": {"speculative_config": plugin(Sometimes, 5)},
    "sometimes-alone": {"speculative_config": plugin(Sometimes, 3), "max_num_seqs": 1},
    "sometimes-chunked": {"speculative_config": plugin(Sometimes, 4), **SMALL},
    "sometimes-preempted": {"speculative_config": plugin(Sometimes, 4), **TIGHT},
    "right": {"speculative_config": plugin(Right, 6)},
    "right-everything": {"speculative_config": plugin(Right, 6), **SMALL, **TIGHT},
    "wrong": {"speculative_config": plugin(Wrong, 6)},
    "wrong-preempted": {"speculative_config": plugin(Wrong, 2), **TIGHT},
    "ngram-process": {"speculative_config": {**NGRAM, "num_speculative_tokens": 4}, **SMALL, **OTHER_PROCESS},
    "peagle-preempted-process": {"speculative_config": head_drafting("peagle", 4), **TIGHT_WITH_HEAD, **OTHER_PROCESS},
    "eagle3-3": {"speculative_config": head_drafting("eagle3", 3)},
    "eagle3-chunked": {"speculative_config": head_drafting("eagle3", 5), **SMALL},
    "eagle3-preempted": {"speculative_config": head_drafting("eagle3", 2), **TIGHT_WITH_HEAD},
    "peagle-1": {"speculative_config": head_drafting("peagle", 1)},
    "peagle-7-alone": {"speculative_config": head_drafting("peagle", 7), "max_num_seqs": 1},
    "peagle-chunked": {"speculative_config": head_drafting("peagle", 7), **SMALL},
    "peagle-preempted": {"speculative_config": head_drafting("peagle", 4), **TIGHT_WITH_HEAD},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    # weights of 16 bits are widened row by row where a step has few rows, so there steps stay small
    "qwen3-bfloat16": ("qwen3", {"dtype": torch.bfloat16}),
}
FEW_ROWS = 16


def reference(path: Path, cases: Sequence[Case], **options: Any) -> list[list[Result]]:
    """Each case in an engine that never saw another."""
    options = {"max_model_len": MAX_LEN, "max_num_seqs": 1, "enable_prefix_caching": False, **options}
    with LLM(str(path), **options) as llm:
        return [run(llm, [case])[0] for case in cases]


def sequences(cases: Sequence[Case], results: Sequence[Sequence[Result]]) -> list[list[int]]:
    """Prompts with what followed, for the drafters that know."""
    return [[*case.prompt, *one[0]] for case, ones in zip(cases, results, strict=True) for one in ones]


@pytest.fixture(scope="module")
def expected(tiny: Callable[..., Path]) -> Callable[[str], tuple[Path, list[list[Result]]]]:
    made: dict[str, tuple[Path, list[list[Result]]]] = {}

    def make(name: str) -> tuple[Path, list[list[Result]]]:
        if name not in made:
            path = tiny(MODELS[name][0], **MODELS[name][1])
            limit = {"max_num_batched_tokens": FEW_ROWS} if "float16" in name else {}
            made[name] = path, reference(path, CASES, **limit)
        return made[name]

    return make


def serve(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"max_model_len": MAX_LEN, "max_num_seqs": 8, **options})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_completions_are_the_same_whatever_is_drafted_and_however_it_is_run(
    name: str,
    way: str,
    expected: Callable[[str], tuple[Path, list[list[Result]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, results = expected(name)
    monkeypatch.setattr(Knowing, "known", sequences(CASES, results))
    options = {**WAYS[way]}
    if "float16" in name:
        options = {"max_num_batched_tokens": FEW_ROWS, **options}
        if "kv_cache_memory" in options:
            options["kv_cache_memory"] //= 2  # half as wide
    with serve(path, **options) as llm:
        assert run(llm, CASES) == results
        assert run(llm, CASES[::-1]) == results[::-1]
        scheduler, drafts = llm.engine._scheduler, llm.acceptance()
        assert (scheduler.num_preemptions > 0) == ("preempted" in way or way == "right-everything")
        assert (scheduler.cache.num_hit > 0) == (way != "no-prefixes")
        assert (drafts.accepted > 0) == ("speculative_config" in options and "wrong" not in way)
        assert drafts.drafted > drafts.accepted or "right" in way or "speculative_config" not in options
        scheduler.check_idle()


def test_requests_that_arrive_while_others_run(
    expected: Callable[[str], tuple[Path, list[list[Result]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, results = expected("qwen3")
    monkeypatch.setattr(Knowing, "known", sequences(CASES, results))
    single = [index for index, case in enumerate(CASES) if case.sampling.n == 1]
    for pause, order in ((1, single), (3, single[::-1]), (7, single[::2] + single[1::2])):
        with serve(path, speculative_config=plugin(Sometimes), **TIGHT) as llm:
            engine, found, waiting = llm.engine, {str(index): [] for index in order}, list(order)
            steps = 0
            while waiting or engine.has_work:
                if waiting and steps % pause == 0:
                    index = waiting.pop(0)
                    engine.add(str(index), CASES[index].prompt, CASES[index].sampling)
                for delta, _ in engine.step():
                    found[delta.request_id] += delta.tokens
                steps += 1
            assert found == {str(index): results[index][0][0] for index in order}


def test_others_that_are_aborted_leave_no_trace(expected: Callable[[str], tuple[Path, list[list[Result]]]]) -> None:
    path, results = expected("qwen3")
    with serve(path, speculative_config={**NGRAM, "num_speculative_tokens": 4}) as llm:
        for salt in range(3):
            llm.engine.add(f"other{salt}", prompt(20, salt), SamplingParams(max_tokens=None, detokenize=False))
            llm.engine.step()
        llm.engine.abort("other1")
        found = run(llm, CASES[1:4])
        assert llm.engine.has_work
        assert found == results[1:4]
        llm.engine.abort("other0")
        llm.engine.abort("other2")
        llm.engine._scheduler.check_idle()


def test_several_completions_are_those_of_neighbouring_seeds(expected: Any) -> None:
    path, _ = expected("qwen3")
    together = Case.of(6, 6, temperature=1.0, n=3, seed=40)
    apart = [Case.of(6, 6, temperature=1.0, seed=40 + index) for index in range(3)]
    with serve(path) as llm:
        found = run(llm, [together])[0]
        assert found == [ones[0] for ones in run(llm, apart)]
        assert len({tuple(one[0]) for one in found}) == 3


def test_without_a_seed_the_engine_s_decides(expected: Any) -> None:
    path, _ = expected("qwen3")
    cases = [Case.of(6, 6, temperature=1.0, seed=None)] * 2

    def found(**options: Any) -> list[tuple[int, ...]]:
        with serve(path, **options) as llm:
            return [tuple(ones[0][0]) for ones in run(llm, cases)]

    first = found()
    assert first == found(seed=0, speculative_config={**NGRAM, "num_speculative_tokens": 3})
    assert len({*first, *found(seed=1)}) == 4, "requests without a seed share their noise"


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_engines_and_batches(
    data: st.DataObject, expected: Callable[[str], tuple[Path, list[list[Result]]]]
) -> None:
    path, results = expected("llama")
    chosen = data.draw(st.lists(st.integers(0, len(CASES) - 1), min_size=1, max_size=9))
    num_drafts = data.draw(st.integers(1, 12))
    drafting = data.draw(
        st.sampled_from(
            [
                None,
                {**NGRAM, "num_speculative_tokens": num_drafts},
                Right,
                Sometimes,
                Wrong,
                head_drafting("eagle3", num_drafts),
                head_drafting("peagle", num_drafts),
            ]
        )
    )
    layers = SIZES["num_hidden_layers"] + (HEAD_LAYERS if isinstance(drafting, dict) and "model" in drafting else 0)
    max_num_seqs = data.draw(st.integers(1, 9))
    options = {
        "speculative_config": plugin(drafting, num_drafts) if isinstance(drafting, type) else drafting,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": data.draw(st.integers(max(max_num_seqs, num_drafts + 1), 60)),
        "max_prefill_tokens_beside_decodes": data.draw(st.integers(1, 60)),
        "kv_cache_memory": cache_bytes(data.draw(st.integers(6, 20)), num_hidden_layers=layers),
        "enable_prefix_caching": data.draw(st.booleans()),
    }
    Knowing.known = sequences(CASES, results)
    try:
        with serve(path, **options) as llm:
            for _ in range(2):
                assert run(llm, [CASES[index] for index in chosen]) == [results[index] for index in chosen]
    finally:
        Knowing.known = ()


class AcceptAll(Exact):
    """Takes every draft for the target's own."""

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        own = super().__call__(logits, batch, draft, slots)
        choice = torch.zeros(len(logits), dtype=torch.int64)
        stands = torch.ones(len(logits), dtype=torch.bool)
        every = Verdict(*ACCEPT_DRAFTS.on("cpu")(choice, stands, batch.logits_start, draft.tokens))
        return every if batch.num_drafts.sum() else own


class ShiftedNoise(Exact):
    """Draws a draft's successor with the noise of another position."""

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        batch.logits_position = batch.logits_position + batch.num_drafts.max()
        return super().__call__(logits, batch, draft, slots)


class NoiseOfTheSlot(Exact):
    """Draws with the slot's number where the request's seed belongs."""

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        slots.seed.copy_(torch.arange(len(slots.seed)))
        return super().__call__(logits, batch, draft, slots)


@pytest.mark.parametrize("broken", [AcceptAll, ShiftedNoise, NoiseOfTheSlot])
def test_the_comparison_notices_a_wrong_verifier(broken: type[Exact], expected: Any) -> None:
    path, results = expected("qwen3")
    with serve(path, speculative_config={**NGRAM, "num_speculative_tokens": 4}) as llm:
        program(llm)._verifier = broken()
        found = run(llm, CASES)
        assert found != results
