"""Faults of one request and of a part at work: the right exception, and nobody else harmed.

Wrong options stand in `unit/engine/test_options.py`, wrong files in `unit/load/test_checkpoint_faults.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import Case, Right, plugin, program, prompt, run
from outrider import (
    LLM,
    DraftContext,
    Drafter,
    EngineDeadError,
    HostDrafter,
    InputError,
    OptionError,
    PromptError,
    SamplingError,
    SamplingParams,
)
from outrider.tensors import Draft

MAX_LEN = 64
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
CHECKS = [Case.of(5, 1, temperature=0.0), Case.of(17, 2, temperature=0.8), Case.of(17, 3, detokenize=True)]


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3", eos_token_id=[7, 8])


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    with LLM(str(path), max_model_len=MAX_LEN) as llm:
        return run(llm, CHECKS)


@pytest.fixture
def llm(path: Path, expected: Any) -> Iterator[LLM]:
    """An engine that must serve as before, with all blocks accounted for, whatever a test asked of it."""
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=NGRAM) as llm:
        yield llm
        assert not llm.engine.has_work
        llm.engine._scheduler.check_idle()
        assert run(llm, CHECKS) == expected


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty": ([[]], "prompt is empty"),
    "empty-text": ("", "prompt is empty"),
    "too-long": ([[1] * MAX_LEN], f"{MAX_LEN} tokens.*at most {MAX_LEN - 1}"),
    "id-past-the-vocabulary": ([[1, 260]], "token id 260 is outside the vocabulary of 260, at index 1 "),
    "negative-id": ([[-1]], "token id -1"),
    "id-past-int64": ([[2**70]], str(2**70)),
    "ids-of-text": ([[1, "a"]], "whole numbers: 'a' at index 1"),
    "ids-of-floats": ([[1.0, 2.0]], "whole numbers: 1.0 at index 0"),
    "booleans": ([True, False], "whole numbers"),
    "floats": ([1.5], "1.5"),
    "none": ([None], "None"),
    "number": ({"prompt_token_ids": 5}, "5"),
    "record-of-nothing": ({}, "prompt or prompt_token_ids"),
    "record-of-something-else": ({"promt": "a"}, "promt"),
    "record-of-none": ({"prompt": None}, "None"),
    "bytes": ([b"ab"], "whole numbers: b'ab'"),
    "one-bad-of-several": ([[1, 2], [3, 4], [999]], "token id 999"),
    "too-long-after-good": (["abc", [2] * 200], "200 tokens"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(llm: LLM, name: str) -> None:
    given, message = BAD_PROMPTS[name]
    with pytest.raises(PromptError, match=message):
        llm.generate(given, SamplingParams(max_tokens=4))
    if not isinstance(given, list):
        with pytest.raises(PromptError, match=message):
            llm.stream(given)


@pytest.mark.parametrize("given", [{"temperature": 0}, [{"temperature": 0}], "greedy", 5, [SamplingParams(), None]])
def test_sampling_params_of_another_type(llm: LLM, given: Any) -> None:
    with pytest.raises(SamplingError, match="sampling_params must be SamplingParams"):
        llm.generate(["x", "y"][: len(given) if isinstance(given, list) else 1], given)
    with pytest.raises(SamplingError, match="sampling_params must be SamplingParams"):
        llm.stream("x", given)


def test_as_many_sampling_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(SamplingError, match="2 sampling params for 3 prompts"):
        llm.generate([[1], [2], [3]], [SamplingParams()] * 2)


BAD_CONVERSATIONS: dict[str, tuple[Any, str]] = {
    "empty": ([], "empty"),
    "one-of-several-empty": ([[{"role": "user", "content": "hi"}], []], "empty"),
    "text": ("hi", "a conversation must be a list.*'hi'"),
    "record": ({"role": "user", "content": "hi"}, "a conversation must be a list"),
    "number": (5, "a conversation must be a list.*5"),
    "texts": (["hi"], "a message must be a record.*'hi'"),
    "text-among-messages": ([{"role": "user", "content": "hi"}, "hi"], "a message must be a record"),
    "no-template": ([{"role": "user", "content": "hi"}], "no chat template"),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_bad_conversations(llm: LLM, name: str) -> None:
    given, message = BAD_CONVERSATIONS[name]
    with pytest.raises(PromptError, match=message):
        llm.chat(given)


TEMPLATE_ARGUMENTS = [
    *("tokenize", "add_generation_prompt", "conversation", "chat_template", "documents", "continue_final_message"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
]


@pytest.mark.parametrize("name", TEMPLATE_ARGUMENTS)
def test_template_arguments_that_are_not_the_caller_s(llm: LLM, name: str) -> None:
    with pytest.raises(PromptError, match=f"chat_template_kwargs holds {name}, "):
        llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs={name: True})
    with pytest.raises(PromptError, match="chat_template_kwargs must be a record"):
        llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs=name)  # type: ignore[arg-type]


def test_a_long_prompt_is_not_printed_for_one_wrong_token(llm: LLM) -> None:
    for wrong in (999, "a"):
        with pytest.raises(PromptError) as refused:
            llm.generate([[1] * 60 + [wrong]])
        assert "index 60" in str(refused.value) and len(str(refused.value)) < 120


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    *[({name: math.nan}, f"{name}.*nan") for name in ("temperature", "top_p", "min_p")],
    *[({name: math.inf}, f"{name}.*inf") for name in ("temperature", "top_p", "min_p")],
    *[({name: -0.5}, f"{name}.*-0.5") for name in ("temperature", "top_p", "min_p")],
    *[({name: "x"}, f"{name}.*'x'") for name in ("temperature", "top_p", "top_k", "n", "max_tokens", "seed")],
    *[({name: 1.5}, f"{name}.*1.5") for name in ("top_k", "n", "max_tokens", "min_tokens", "seed")],
    *[({name: True}, f"{name}.*True") for name in ("temperature", "top_k", "n", "max_tokens", "seed")],
    ({"temprature": 0.0}, r"unknown sampling parameter: temprature \(did you mean temperature\?\)"),
    *[({name: None}, f"{name} is not offered yet") for name in ("logprobs", "presence_penalty", "logit_bias")],
    ({"stop": 5}, "stop must be a list of strings: 5"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids: 5"),
    ({"stop_token_ids": "ab"}, "stop_token_ids must be a list of token ids: 'ab'"),
    *[({name: -2}, f"{name}.*-2") for name in ("top_k", "n", "max_tokens", "min_tokens")],
    ({"top_p": -0.1}, r"top_p must be a number in \[0, 1\]: -0.1"),
    ({"seed": -(2**63) - 1}, r"seed must be a whole number of at least -2\*\*63: -9223"),
    ({"top_p": 1.1}, "top_p.*1.1"),
    ({"n": 0}, "n must.*0"),
    ({"max_tokens": 0}, "max_tokens.*0"),
    ({"seed": 2**63}, f"seed.*{2**63}"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is more than max_tokens 4"),
    ({"stop": "a", "detokenize": False}, "detokenize"),
    ({"stop": ["a", ""]}, "non-empty"),
    ({"stop": [1]}, r"\(1,\)"),
    ({"stop_token_ids": [-1]}, "-1"),
    ({"stop_token_ids": ["a"]}, "'a'"),
    ({"stop_token_ids": list(range(17))}, "17 ids; give at most 16"),
]


@pytest.mark.parametrize(("given", "message"), BAD_SAMPLING, ids=repr)
def test_bad_sampling(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**given)


SERVED: list[dict[str, Any]] = [
    {"temperature": 1e-45},
    {"temperature": 1e-30},
    {"temperature": 1e6},
    {"top_p": 1e-300},
    {"min_p": 1.0},
    {"min_p": 1e-300},
    {"top_k": 10**6},
    {"top_k": 2**40},
    {"max_tokens": 2**62},
    {"max_tokens": None, "min_tokens": 2**40},
    {"stop_token_ids": list(range(100, 115)), "ignore_eos": False},  # and two end-of-text tokens of the model's own
    {"stop_token_ids": list(range(100, 115)), "ignore_eos": False, "min_tokens": 8},
    {"seed": 2**63 - 1, "n": 3},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 1e38}, r"temperature must be a number in \[0, 1e\+06\]"),
    ({"temperature": 1e300}, "temperature must be"),
    ({"temperature": 10**400}, "temperature must be"),
    ({"stop_token_ids": [260]}, "stop token id 260 is outside the vocabulary of 260"),
    ({"stop_token_ids": [2**62]}, f"stop token id {2**62} is outside"),
    ({"stop_token_ids": [2**64]}, f"stop token id {2**64} is outside"),
]


@pytest.mark.parametrize("extreme", SERVED, ids=repr)
def test_extremes_that_are_served_harm_nobody(llm: LLM, expected: Any, extreme: dict[str, Any]) -> None:
    found = run(llm, [*CHECKS, Case.of(6, 6, **extreme)])
    assert found[:-1] == expected
    assert all(0 <= token < 260 for tokens, *_ in found[-1] for token in tokens)
    assert all(tokens for tokens, *_ in found[-1])


@pytest.mark.parametrize(("extreme", "message"), REFUSED, ids=lambda given: str(given)[:40])
def test_extremes_that_are_refused_harm_nobody(llm: LLM, extreme: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        run(llm, [*CHECKS, Case.of(6, 6, **extreme)])


def test_a_callback_that_raises(llm: LLM) -> None:
    def refuse(finished: int, total: int) -> None:
        raise LookupError(f"{finished} of {total}")

    with pytest.raises(LookupError, match="1 of 4"):
        llm.generate([[1, 2]] * 4, SamplingParams(detokenize=False), progress=refuse)


def test_requests_by_hand(llm: LLM) -> None:
    engine, sampling = llm.engine, SamplingParams(max_tokens=3, detokenize=False)
    engine.add("a", [1, 2], sampling)
    with pytest.raises(InputError, match="request id is already in use: 'a'"):
        engine.add("a", [3], sampling)
    with pytest.raises(PromptError, match="empty"):
        engine.add("b", [], sampling)
    engine.abort("never added")
    engine.abort("a")
    engine.abort("a")
    assert engine.step() == []


def test_a_refused_request_does_not_change_the_noise_of_the_next(path: Path) -> None:
    found = []
    for refused in ([], [[999]], [[], [1] * MAX_LEN]):
        with LLM(str(path), max_model_len=MAX_LEN) as llm:
            for ids in refused:
                with pytest.raises(PromptError):
                    llm.generate([ids])
            found.append(run(llm, [Case.of(9, 1, seed=None)]))
    assert found[0] == found[1] == found[2]


class Failing(HostDrafter):
    """Works for a while."""

    name = "failing"
    left = 5

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        self.left -= 1
        if self.left < 0:
            raise LookupError("the drafter lost its way")
        return tokens[-2:]


class Speechless(Failing):
    """Says nothing of what went wrong."""

    name = "speechless"

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        raise ZeroDivisionError


class Outside(HostDrafter):
    name = "outside"

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        return [1, 260]


class Misshapen(Drafter):
    """Proposals that are not what a `Draft` is: `spoil` changes a right one."""

    name = "misshapen"
    needs = frozenset()
    spoil: Callable[[Draft], Draft]

    def propose(self, context: DraftContext) -> Draft:
        size = context.batch.slot.shape[0]
        tokens = torch.zeros((size, self.num_drafts), dtype=torch.int64)
        return Misshapen.spoil(Draft(tokens, torch.full((size,), self.num_drafts, dtype=torch.int32), None))


SPOILS: dict[str, Callable[[Draft], Draft]] = {
    "too-wide": lambda draft: Draft(torch.zeros((len(draft.tokens), 9), dtype=torch.int64), draft.length, None),
    "too-narrow": lambda draft: Draft(draft.tokens[:, :1], draft.length, None),
    "a-row-too-many": lambda draft: Draft(draft.tokens.repeat(3, 1), draft.length.repeat(3), None),
    "longer-than-k": lambda draft: Draft(draft.tokens, draft.length + 5, None),
    "negative-length": lambda draft: Draft(draft.tokens, -draft.length, None),
    "outside": lambda draft: Draft(draft.tokens + 260, draft.length, None),
    "negative": lambda draft: Draft(draft.tokens - 1, draft.length, None),
    "floats": lambda draft: Draft(draft.tokens.float() + 0.5, draft.length, None),
    "nothing": lambda draft: None,  # type: ignore[dict-item, return-value]
}


def die(llm: LLM) -> EngineDeadError:
    """Runs until the engine fails; it must say so, then and at every later call."""
    with pytest.raises(EngineDeadError) as died:
        run(llm, [Case.of(9, salt, max_tokens=40) for salt in range(3)])
    assert died.value.__cause__ is not None
    for call in (lambda: run(llm, CHECKS), lambda: llm.stream([1, 2]), llm.engine.step):
        with pytest.raises(EngineDeadError, match=r"failed earlier.*build a new one") as refused:
            call()
        assert refused.value.__cause__ is died.value.__cause__
    return died.value


def test_a_drafter_that_raises(path: Path) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Failing)) as llm:
        died = die(llm)
        assert "the drafter lost its way" in str(died) and isinstance(died.__cause__, LookupError)


def test_an_error_without_a_message_is_named(path: Path) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Speechless)) as llm:
        assert str(die(llm)) == "the engine failed in a step: ZeroDivisionError()"


def test_blocks_are_conserved_when_the_engine_fails(path: Path) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Failing)) as llm:
        die(llm)
        assert not llm.engine.has_work
        llm.engine._scheduler.check_idle()


def test_a_drafter_that_guesses_outside_the_vocabulary(path: Path) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Outside)) as llm:
        died = die(llm)
        assert "Outside guessed token 260, outside the vocabulary of 260" in str(died)
        assert isinstance(died.__cause__, OptionError)


@pytest.mark.parametrize("name", SPOILS)
def test_a_drafter_with_proposals_of_the_wrong_shape(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Misshapen, "spoil", staticmethod(SPOILS[name]), raising=False)
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Misshapen, 3)) as llm:  # type: ignore[arg-type]
        die(llm)


def test_a_model_that_fails_in_the_middle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Right)) as llm:
        stream = llm.stream(prompt(9), SamplingParams(max_tokens=30, detokenize=False))
        next(stream)
        monkeypatch.setattr(program(llm), "_model", None)
        with pytest.raises(EngineDeadError) as died:
            list(stream)
        assert isinstance(died.value.__cause__, AttributeError)
