"""Logits that hold no token to draw: that request ends with an error that says so, and every other is unharmed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import cache_bytes, parameters, program, prompt, write, write_tokenizer
from emulated import Emulated
from heads import drafting
from outrider import LLM, SamplingParams
from outrider import config as config_module
from outrider.draft.eagle.base import HeadDrafter
from outrider.errors import LogitsError
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.runner.eager import EagerRunner
from servers import events, serving
from spoilers import FEW, GOOD, NUM_GOOD, PLAIN, PROMPTS, SPOILERS, check_spoilt_beside_good, completions, spoilt

RUNNERS = pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=["eager", "graph"])
WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}},
    "peagle": {"speculative_config": drafting("peagle", 3)},
    "eagle3": {"speculative_config": drafting("eagle3", 3)},
    "rejection": {"speculative_config": drafting("peagle", 3), "verifier": "rejection"},
}


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


@torch.inference_mode()
def spoil(tensor: Tensor, value: float) -> None:
    tensor.fill_(value)


@torch.inference_mode()
def scale(tensor: Tensor, factor: float) -> None:
    tensor.mul_(factor)


@pytest.fixture(scope="module")
def golden(path: Path) -> list[list[int]]:
    with LLM(str(path), device="cpu") as llm:
        return [one.token_ids for one in completions(llm, [*GOOD, *GOOD])]


@RUNNERS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_request_without_a_token_to_draw_ends_and_the_others_go_on(
    path: Path, golden: list[list[int]], way: str, spoiler: str, runner: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verifier sees the same of one row whatever the drafter: it ends after the same tokens."""
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    check_spoilt_beside_good(path, golden, spoiler, **WAYS[way])


def test_the_check_fails_without_the_flag(path: Path, golden: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a sampler that gives some token for every row."""
    own = GUMBEL_ARGMAX.kernel("cpu")
    monkeypatch.setitem(GUMBEL_ARGMAX._found, "cpu", lambda *given, **named: own(*given, **named).clamp(min=0))
    with pytest.raises(AssertionError):
        check_spoilt_beside_good(path, golden, "nan")


def test_tokens_that_a_processor_masks_are_no_fault(path: Path, golden: list[list[int]]) -> None:
    """All but some of them masked, as a grammar does: a row with one finite logit has a token to draw."""
    with LLM(str(path), device="cpu", logits_processors=["spoilers:Few"], **WAYS["peagle"]) as llm:
        found = completions(llm, [*GOOD, *(spoilt(good, "nan") for good in GOOD)])
    assert [one.token_ids for one in found[: len(GOOD)]] == golden[: len(GOOD)]
    assert all(one.finish_reason == "length" and set(one.token_ids) <= set(FEW) for one in found[len(GOOD) :])


@RUNNERS
@pytest.mark.parametrize("way", ["alone", "peagle"])
def test_nan_in_one_weight_row_harms_only_those_who_read_it(
    path: Path, way: str, runner: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's embedding is NaN. Whether it stands in the prompt or comes as a token, the request ends there."""
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    with LLM(str(path), device="cpu", **WAYS[way]) as llm:
        before = completions(llm, [*GOOD, *GOOD])
        bad = before[1].token_ids[4]
        embedding = program(llm)._model.embedding.weight.tensor
        assert not program(llm)._model.config.tie_word_embeddings
        spoil(embedding[bad], math.nan)
        llm.engine._scheduler.cache.clear_prefixes()
        after = completions(llm, [*GOOD, *GOOD])
        for one, was, asked in zip(after, before, PROMPTS, strict=True):
            met = 0 if bad in asked else was.token_ids.index(bad) + 1 if bad in was.token_ids[:-1] else None
            assert (one.finish_reason == "error") == (met is not None)
            assert one.token_ids == was.token_ids[:met]
        assert after[1].finish_reason == "error"
        llm.engine._scheduler.check_idle()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_damaged_norm_ends_every_request(path: Path, value: float) -> None:
    with LLM(str(path), device="cpu", **WAYS["peagle"]) as llm:
        spoil(parameters(program(llm)._model)["model.norm.weight"][3], value)
        scale(parameters(program(llm)._model)["lm_head.weight"], 100.0)
        found = completions(llm, [*GOOD, *GOOD])
        assert {(one.finish_reason, tuple(one.token_ids)) for one in found} == {("error", ())}
        llm.engine._scheduler.check_idle()


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-40, 9e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-10, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 1e-300, 1e-40, 1.0])
def test_extreme_sampling_values_are_as_good_as_greedy(
    path: Path, golden: list[list[int]], temperature: float, top_p: float, min_p: float
) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, seed=1, **{**PLAIN, "max_tokens": 4})
    with LLM(str(path), device="cpu") as llm:
        (one,) = completions(llm, [sampling])
    assert one.token_ids == golden[0][:4] and one.error is None


def test_logits_that_overflow_by_the_temperature_are_said(path: Path) -> None:
    with LLM(str(path), device="cpu") as llm:
        scale(parameters(program(llm)._model)["lm_head.weight"], 1e35)
        tiny = SamplingParams(temperature=1e-5, **PLAIN)
        greedy, hot = completions(llm, [GOOD[0], tiny])
    assert greedy.finish_reason == "length" and hot.finish_reason == "error"


@RUNNERS
@pytest.mark.parametrize("method", ["peagle", "eagle3"])
@pytest.mark.parametrize("verifier", ["exact", "rejection"])
def test_drafts_from_nan_are_dropped(
    path: Path,
    golden: list[list[int]],
    method: str,
    verifier: str,
    runner: type[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The drafter's numbers are none: nothing is drafted, and the text stays the same."""
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    options = {"speculative_config": drafting(method, 3), "verifier": verifier}
    with LLM(str(path), device="cpu", **options) as llm:
        drafter = program(llm)._drafter
        assert isinstance(drafter, HeadDrafter)
        spoil(parameters(drafter.network)["norm.weight"], math.nan)
        found = completions(llm, [*GOOD, *GOOD])
        assert [one.token_ids for one in found] == golden
        assert llm.acceptance().drafted == 0
        llm.engine._scheduler.check_idle()


def test_a_later_pass_without_numbers_keeps_the_drafts_before_it(path: Path, golden: list[list[int]]) -> None:
    """One token's logit is NaN where a certain draft was fed in: the drafts before it are verified as ever."""
    with LLM(str(path), device="cpu", speculative_config=drafting("eagle3", 3)) as llm:
        drafter: Any = program(llm)._drafter
        guess, count = drafter.guess, 0

        def spoiling(normed: Tensor, *given: Any) -> Any:
            nonlocal count
            count += 1
            return guess(normed * math.nan if count % 3 == 0 else normed, *given)

        drafter.guess = spoiling
        found = completions(llm, [*GOOD, *GOOD])
        assert [one.token_ids for one in found] == golden
        report = llm.acceptance()
        assert report.drafts > 0 and report.drafted <= 2 * report.drafts


def test_the_prefix_cache_forgets_what_may_hold_nan(path: Path) -> None:
    """A good request that shares the start of a bad one's prompt computes it anew, and those beside it keep theirs."""
    long = prompt(64, 9)
    with LLM(str(path), device="cpu", logits_processors=["spoilers:Spoil"]) as llm:
        cache = llm.engine._scheduler.cache
        (expected,) = llm.generate([long], GOOD[0])
        assert len(cache.index) > 0
        (bad,) = llm.generate([long], spoilt(GOOD[0], "nan"))
        assert bad.num_cached_tokens > 0 and bad.outputs[0].finish_reason == "error"
        assert not cache.index.match(long, "")
        (again,) = llm.generate([long], GOOD[0])
        assert again.num_cached_tokens == 0
        assert again.outputs[0].token_ids == expected.outputs[0].token_ids


def test_keys_and_values_that_are_nan_reach_nobody_else(path: Path, golden: list[list[int]]) -> None:
    """Every block of the cache holds NaN before the good requests take it."""
    for way in ("alone", "peagle"):
        with LLM(str(path), device="cpu", **WAYS[way]) as llm:
            caches: list[Any] = [*program(llm)._cache]
            drafter = program(llm)._drafter
            caches += getattr(drafter, "_cache", [])
            for layer in caches:
                for each in layer:
                    spoil(each, math.nan)
            assert [one.token_ids for one in completions(llm, [*GOOD, *GOOD])] == golden


def test_a_stream_raises_after_its_tokens(path: Path) -> None:
    with LLM(str(path), device="cpu", logits_processors=["spoilers:Spoil"]) as llm:
        pieces = []
        with pytest.raises(LogitsError, match=f"output token {NUM_GOOD + 1} .*bfloat16"):
            for piece in llm.stream(PROMPTS[0], spoilt(GOOD[0], "inf")):
                pieces.append(piece)
        assert len(pieces) == NUM_GOOD
        assert llm.generate([PROMPTS[0]], GOOD[0])[0].outputs[0].finish_reason == "length"


BAD_TOKEN = ord("x")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, in which the embedding of the letter x is NaN."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    path = write_tokenizer(write(tmp_path_factory.mktemp("damaged")))
    (bad,) = AutoTokenizer.from_pretrained(path).encode("x")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][bad] = math.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_through_an_engine_of_its_own_process(damaged: Path) -> None:
    with LLM(str(damaged), device="cpu", enable_multiprocessing=True, **WAYS["ngram"]) as llm:
        good, bad = llm.generate(["abc", "abx"], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert good.outputs[0].finish_reason == "length" and len(good.outputs[0].token_ids) == 5
    assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].token_ids == []
    assert "output token 1 " in bad.outputs[0].error


def test_over_http(damaged: Path, tmp_path: Path) -> None:
    """A 500 that says what it is, an event in a stream, a count by reason; and the server serves on."""
    with serving(tmp_path / "log", str(damaged), "--device", "cpu") as server:
        asked = {"model": server.model, "max_tokens": 4, "temperature": 0}
        bad = server.post("/v1/completions", prompt=["abc", "abx"], **asked)
        error = bad.json()["error"]
        assert bad.status_code == 500 and error["code"] == "invalid_logits" and error["type"] == "server_error"
        assert "output token 1 hold NaN" in error["message"]
        with server.http.stream("POST", "/v1/completions", json={**asked, "prompt": "abx", "stream": True}) as stream:
            *_, last = events(stream)
        assert last["error"]["code"] == "invalid_logits"
        said = server.post("/v1/responses", input="x", model=server.model, max_output_tokens=4)
        assert said.status_code in (400, 500)
        good = server.post("/v1/completions", prompt="abc", **asked)
        assert good.status_code == 200 and good.json()["usage"]["completion_tokens"] > 0
        counted = [name for name in server.metrics() if 'finished_reason="error"' in name]
        assert len(counted) == 2, "the count, and when it was created"
    assert "hold NaN" in (tmp_path / "log").read_text()


def test_a_small_cache_is_whole_after_errors(path: Path) -> None:
    """Blocks are conserved under preemption, with spoilt requests among the others."""
    few = cache_bytes(9)
    options = {"kv_cache_memory": few, "max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64}
    with LLM(str(path), device="cpu", logits_processors=["spoilers:Spoil"], **options) as llm:
        sampling = [*GOOD, *(spoilt(good, "nan") for good in GOOD)]
        for _ in range(3):
            found = completions(llm, sampling)
            assert [one.finish_reason for one in found] == ["length"] * len(GOOD) + ["error"] * len(GOOD)
            llm.engine._scheduler.check_idle()
