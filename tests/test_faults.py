"""Faults of one request and of a part at work: the right exception, and nobody else harmed.

Wrong options stand in `unit/engine/test_options.py`, wrong files in `unit/load/test_checkpoint_faults.py`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from checkpoints import Case, Right, drafter_failures, plugin, program, prompt, run
from emulated import Emulated
from outrider import (
    LLM,
    DraftContext,
    Drafter,
    EngineDeadError,
    HostDrafter,
    InputError,
    LogitsProcessor,
    OptionError,
    PromptError,
    SamplingError,
    SamplingParams,
    UnsupportedError,
)
from outrider import config as config_module
from outrider.draft.base import DraftOptions, TargetFacts
from outrider.draft.ngram import Ngram
from outrider.processing import Column, SamplingField, Table
from outrider.runner.eager import EagerRunner
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
    ask = partial(llm.chat, [{"role": "user", "content": "hi"}], chat_template="{{ messages[0].content }}")
    with pytest.raises(PromptError, match=f"chat_template_kwargs holds {name}, "):
        ask(chat_template_kwargs={name: True})
    with pytest.raises(PromptError, match="chat_template_kwargs must be a record"):
        ask(chat_template_kwargs=name)  # type: ignore[arg-type]


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
    """Drafts well but for the calls that a test names: `faults` maps a method to the numbers of its calls that fail."""

    name = "failing"
    faults: ClassVar[dict[str, Sequence[int]]] = {}

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        super().__init__(options, target)
        self.calls: Counter[str] = Counter()
        self.call("build")

    def call(self, method: str) -> None:
        self.calls[method] += 1
        if self.calls[method] in Failing.faults.get(method, ()):
            raise LookupError(f"the drafter lost its way in {method}")

    def admit(self, slot: int, tokens: Any) -> None:
        self.call("admit")

    def release(self, slot: int) -> None:
        self.call("release")

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        self.call("guess")
        return tokens[-2:]


class Outside(HostDrafter):
    name = "outside"

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        return [1, 260]


class Misshapen(Drafter):
    """Proposals that are not what a `Draft` is: `spoil` changes a right one. It can be recorded."""

    name = "misshapen"
    needs = frozenset()
    gives_logits = True
    spoil: Callable[[Draft], Draft]
    spoilt_from = 6  # calls: the graph runner's first ones are made while it is built

    def propose(self, context: DraftContext) -> Draft:
        size = context.batch.slot.shape[0]
        tokens = torch.zeros((size, self.num_drafts), dtype=torch.int64)
        logits = torch.zeros((size, self.num_drafts, self.target.vocab_size))
        right = Draft(tokens, torch.full((size,), self.num_drafts, dtype=torch.int32), logits)
        self.num_calls = getattr(self, "num_calls", 0) + 1
        return Misshapen.spoil(right) if self.num_calls > Misshapen.spoilt_from else right


def _changed(**fields: Callable[[Any], Any]) -> Callable[[Draft], Draft]:
    return lambda draft: replace(draft, **{name: change(getattr(draft, name)) for name, change in fields.items()})


SPOILS: dict[str, Callable[[Draft], Draft]] = {
    "too-wide": _changed(tokens=lambda tokens: torch.zeros((len(tokens), 9), dtype=torch.int64)),
    "too-narrow": _changed(tokens=lambda tokens: tokens[:, :1]),
    "a-row-too-many": _changed(tokens=lambda tokens: tokens.repeat(3, 1), length=lambda length: length.repeat(3)),
    "longer-than-k": _changed(length=lambda length: length + 5),
    "negative-length": _changed(length=lambda length: -length),
    "outside": _changed(tokens=lambda tokens: tokens + 260),
    "far-outside": _changed(tokens=lambda tokens: tokens + 2**62),
    "negative": _changed(tokens=lambda tokens: tokens - 1),
    "one-outside": _changed(tokens=lambda tokens: tokens.index_fill(1, torch.tensor([1]), 260)),
    "floats": _changed(tokens=lambda tokens: tokens.float() + 0.5),
    "narrow-ids": _changed(tokens=lambda tokens: tokens.int()),
    "elsewhere": _changed(tokens=lambda tokens: tokens.to("meta")),
    "lists": _changed(tokens=lambda tokens: tokens.tolist()),
    "nothing": lambda draft: None,  # type: ignore[dict-item, return-value]
    "nan": _changed(logits=lambda logits: logits * math.nan),
    "one-nan": _changed(logits=lambda logits: logits.index_fill(2, torch.tensor([5]), math.nan)),
    "infinite": _changed(logits=lambda logits: logits + math.inf),
    "impossible": _changed(logits=lambda logits: logits - math.inf),
    "no-logits": _changed(logits=lambda logits: None),
    "logits-of-another-vocabulary": _changed(logits=lambda logits: logits[..., :-1]),
}
RUNNERS = pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=["eager", "graph"])


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged of a drafter as a warning."""

    def messages() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if hasattr(record, "failed_drafter") and record.levelno >= logging.WARNING
        ]

    return messages


FAULTS: dict[str, tuple[dict[str, Sequence[int]], int]] = {
    "guess-once": ({"guess": [4]}, 1),
    "guess-at-first": ({"guess": [1]}, 1),
    "guess-twice": ({"guess": [3, 9]}, 2),
    "guess-always": ({"guess": range(1, 1000)}, 3),
    "guess-late": ({"guess": range(30, 1000)}, 3),
    "admit-once": ({"admit": [2]}, 1),
    "admit-always": ({"admit": range(1, 1000)}, 3),
    "release-once": ({"release": [1]}, 1),
    "everything": ({method: range(1, 1000) for method in ("guess", "admit", "release")}, 3),
}


@pytest.mark.failing_drafter
@pytest.mark.parametrize("name", FAULTS)
def test_a_drafter_that_raises_costs_drafts_and_no_request(
    path: Path, expected: Any, name: str, monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    """Its drafts of that step are dropped; after three failures it is left out. Each time the texts are the same."""
    faults, num_failures = FAULTS[name]
    monkeypatch.setattr(Failing, "faults", faults)
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Failing), max_num_seqs=2) as llm:
        for _ in range(4):
            assert run(llm, CHECKS) == expected
        llm.engine._scheduler.check_idle()
        found = llm.engine.stats().drafter
        stopped = num_failures >= 3
        assert found == (num_failures, stopped)
        assert len(warned()) == 1 + stopped
        assert "the drafter lost its way in" in warned()[0] and "its drafts of this step are dropped" in warned()[0]
        drafts = llm.acceptance().drafts
        assert run(llm, CHECKS) == expected
        assert (llm.acceptance().drafts == drafts) == stopped, "a drafter that was stopped drafts no more"


@pytest.mark.failing_drafter
def test_a_failure_of_a_drafter_of_ours_would_be_seen(
    path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are right all the same, so what fails a test is the watch in `conftest.py`."""

    def broken(self: Ngram, context: DraftContext) -> Draft:
        raise AssertionError("a bug")

    monkeypatch.setattr(Ngram, "propose", broken)
    with drafter_failures() as failures, LLM(str(path), max_model_len=MAX_LEN, speculative_config=NGRAM) as llm:
        assert run(llm, CHECKS) == expected
    assert failures and "a bug" in failures[0] and "Traceback" in failures[0]


def test_a_drafter_that_cannot_be_built_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "faults", {"build": [1]})
    with pytest.raises(OptionError, match=r"drafter failing could not be built: LookupError: .*lost its way in build;"):
        LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Failing))


@pytest.mark.failing_drafter
def test_a_drafter_that_guesses_outside_the_vocabulary(
    path: Path, expected: Any, warned: Callable[[], list[str]]
) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Outside)) as llm:
        assert run(llm, CHECKS) == expected
    assert "Outside guessed token 260, outside the vocabulary of 260" in warned()[0] and len(warned()) == 2


@RUNNERS
@pytest.mark.failing_drafter
@pytest.mark.parametrize("verifier", ["exact", "rejection"])
@pytest.mark.parametrize("name", SPOILS)
def test_drafts_that_are_wrong_are_dropped(
    path: Path,
    expected: Any,
    name: str,
    verifier: str,
    runner: type[Any],
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    monkeypatch.setattr(Misshapen, "spoil", staticmethod(SPOILS[name]), raising=False)
    monkeypatch.setattr(Misshapen, "spoilt_from", 6 if runner is EagerRunner else 50)
    config = plugin(Misshapen, 3)  # type: ignore[arg-type]
    capture = {"capture_sizes": [4], "max_num_seqs": 4} if runner is Emulated else {}
    with LLM(
        str(path), max_model_len=MAX_LEN, speculative_config=config, device="cpu", verifier=verifier, **capture
    ) as llm:
        found = [run(llm, CHECKS) for _ in range(3)]
        drafter = llm.engine.stats().drafter
    only_logits = name in ("nan", "one-nan", "infinite", "impossible", "no-logits", "logits-of-another-vocabulary")
    if verifier == "exact":
        assert found == [expected] * 3
    else:
        assert all(greedy[0] == expected[0] for greedy in found)
        assert all(0 <= token < 260 for texts in found for text in texts for token in text[0][0])
    if verifier == "exact" and only_logits:
        assert drafter is None and not warned(), "nobody reads the distribution"
    else:
        assert drafter is not None and drafter.stopped and len(warned()) == 2


def test_a_recorded_drafter_that_fails_while_it_is_recorded_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "RUNNERS", (Emulated,))
    monkeypatch.setattr(Misshapen, "spoil", staticmethod(SPOILS["too-wide"]), raising=False)
    monkeypatch.setattr(Misshapen, "spoilt_from", 0)
    with pytest.raises(UnsupportedError, match=r"with drafter misshapen: OptionError: tokens of a draft must be"):
        config = plugin(Misshapen, 3)  # type: ignore[arg-type]
        LLM(str(path), max_model_len=MAX_LEN, speculative_config=config, device="cpu")


class Fragile(LogitsProcessor):
    """Favours a token, and fails where a test says; `when` counts the calls of that method."""

    name = "fragile"
    fields = (SamplingField("fragile", float, 0.0, "how much it favours token 5"),)
    tables = (Table("favour", torch.float32),)
    columns = (Column("favoured", 1, torch.float32),)
    fails_in: ClassVar[str] = ""
    when: ClassVar[int] = 1

    serving: ClassVar[bool] = False

    def __init__(self) -> None:
        self.calls = 0

    def fault(self, method: str) -> str:
        """How the result of this call is to be wrong, "" for not at all. LookupError if the call is to fail."""
        named, _, how = Fragile.fails_in.partition(" ")
        if named != method or not self.serving:
            return ""
        self.calls += 1
        if self.calls != Fragile.when:
            return ""
        if not how:
            raise LookupError(f"lost in {method}")
        return how

    def wanted(self, sampling: SamplingParams) -> bool:
        if super().wanted(sampling):
            self.fault("wanted")
        return super().wanted(sampling)

    def admit(self, admission: Any) -> Any:
        given = {"nothing": None, "value": {"favour": {3: "x"}}}
        return given.get(self.fault("admit"), {"favour": 50.0})

    def __call__(self, logits: Tensor, batch: Any, slots: Any, state: Any) -> Any:
        logits[:, 5] += state["favour"].index_select(0, batch.logits_slot)
        given = {
            "nothing": None,
            "narrow": logits[:, :-1],
            "elsewhere": logits.to("meta"),
            "by columns": logits.t().contiguous().t(),
        }
        return given.get(self.fault("__call__"), logits)

    def commit(self, *given: Any) -> None:
        self.fault("commit")

    def report(self, logits: Tensor, batch: Any, verdict: Any) -> Any:
        values = torch.ones((*verdict.tokens.shape, 1))
        given = {"nothing": None, "narrow": {"favoured": values[:, 1:]}, "without": {}}
        return given.get(self.fault("report"), {"favoured": values})

    def release(self, slot: int) -> None:
        self.fault("release")


CALLS = ("__call__", "__call__ narrow", "__call__ nothing", "__call__ elsewhere")
METHODS = ("admit", "admit nothing", "admit value", *CALLS, "commit")
GOOD = ("", "__call__ by columns")
REPORTS = ("report", "report narrow", "report without", "report nothing")


@RUNNERS
@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("fails_in", [*METHODS, *REPORTS, "release", "wanted", *GOOD])
def test_a_logits_processor_that_fails_ends_the_requests_that_want_it(
    path: Path,
    expected: Any,
    fails_in: str,
    when: int,
    runner: type[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Others have their tokens, and the next requests that want it are served. Those of GOOD fail nowhere."""
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    for name, value in (("fails_in", fails_in), ("when", when), ("serving", False)):
        monkeypatch.setattr(Fragile, name, value)
    wants = Case.of(11, 9, temperature=0.0, max_tokens=9, extra_args={"fragile": 1.0})
    own = {"logits_processors": [f"{__name__}:Fragile"], "device": "cpu", "speculative_config": NGRAM}
    with LLM(str(path), max_model_len=MAX_LEN, max_num_seqs=4, **own) as llm:  # type: ignore[arg-type]
        monkeypatch.setattr(Fragile, "serving", True)
        found = [run(llm, [*CHECKS, wants]) for _ in range(3)]
        llm.engine._scheduler.check_idle()
    right = ([5] * 9, "", "length", None)
    assert all(one[:-1] == expected for one in found)
    ends = [one[-1][0] for one in found]
    assert ends[-1] == right
    harmed = [end for end in ends if end != right]
    assert len(harmed) == (fails_in in METHODS)
    for tokens, _, reason, _ in harmed:
        assert reason == "error" and tokens == [5] * len(tokens) and len(tokens) < 9
    said = [one for one in caplog.records if "logits processor fragile failed in" in one.getMessage()]
    assert len(said) == (fails_in not in GOOD) and all(one.exc_info for one in said)


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


def broken(llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception) -> LLM:
    """The engine with a model that fails in its sixth step."""
    model, left = program(llm)._model, [5]

    class Broken:
        def __getattr__(self, name: str) -> Any:
            left[0] -= name == "forward"
            if left[0] < 0:
                raise error
            return getattr(model, name)

    monkeypatch.setattr(program(llm), "_model", Broken())
    return llm


def test_an_error_without_a_message_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(path), max_model_len=MAX_LEN) as llm:
        assert str(die(broken(llm, monkeypatch, ZeroDivisionError()))) == (
            "the engine failed in a step: ZeroDivisionError()"
        )


def test_blocks_are_conserved_when_the_engine_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(path), max_model_len=MAX_LEN) as llm:
        die(broken(llm, monkeypatch, LookupError("lost")))
        assert not llm.engine.has_work
        llm.engine._scheduler.check_idle()


def test_a_model_that_fails_in_the_middle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(path), max_model_len=MAX_LEN, speculative_config=plugin(Right)) as llm:
        stream = llm.stream(prompt(9), SamplingParams(max_tokens=30, detokenize=False))
        next(stream)
        monkeypatch.setattr(program(llm), "_model", None)
        with pytest.raises(EngineDeadError) as died:
            list(stream)
        assert isinstance(died.value.__cause__, AttributeError)
