"""The shapes that `LLM` takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import prompt, write, write_tokenizer
from outrider import LLM, EngineDeadError, OptionError, OutriderError, PromptError, SamplingParams
from outrider.engine.engine import StepTimes
from outrider.engine.inproc import InprocClient
from outrider.options import EngineOptions

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
TEMPLATE = (
    "{% if ratio is defined %}{{ 1 / ratio }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[{{ who or 'assistant' }}]{% endif %}"
)


WHERE: dict[str, dict[str, Any]] = {
    "here": {},
    "worker process": {"distributed_executor_backend": "mp"},
    "engine process": {"enable_multiprocessing": True},
}


@pytest.fixture(scope="module", params=WHERE)
def llm(tiny: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(str(tiny("qwen3")), max_model_len=64, **WHERE[request.param]) as llm:
        yield llm


@pytest.fixture
def driven(llm: LLM) -> LLM:
    """One whose engine can be looked into."""
    if not isinstance(llm._client, InprocClient):
        pytest.skip("the engine is in another process")
    return llm


def test_a_prompt_in_any_of_its_forms(llm: LLM) -> None:
    ids = llm.tokenizer.encode("né!")
    expected = llm.generate(ids, GREEDY)[0]
    assert expected.prompt is None and expected.prompt_token_ids == ids and expected.finished
    assert len(expected.outputs) == 1 and len(expected.outputs[0].token_ids) == 6
    for form in ("né!", {"prompt": "né!"}, {"prompt_token_ids": ids}, {"prompt": "né!", "prompt_token_ids": ids}):
        (found,) = llm.generate(form, GREEDY)
        assert found.outputs == expected.outputs and found.prompt_token_ids == ids
        assert found.prompt == (None if form == {"prompt_token_ids": ids} else "né!")
        assert llm.generate([form, form], GREEDY)[1].outputs == expected.outputs


def test_outputs_are_in_the_order_of_the_prompts_whoever_is_done_first(llm: LLM) -> None:
    prompts = [prompt(length) for length in (9, 5, 13)]
    sampling = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (20, 1, 7)]
    seen: list[tuple[int, int]] = []
    found = llm.generate(prompts, sampling, progress=lambda done, total: seen.append((done, total)))
    assert [output.prompt_token_ids for output in found] == prompts
    assert [len(output.outputs[0].token_ids) for output in found] == [20, 1, 7]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_the_prefix_cache_held_is_told(llm: LLM) -> None:
    text = prompt(40, salt=9)
    assert [llm.generate(text, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 32]


def test_no_prompts_are_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == llm.generate([], GREEDY) == llm.generate([], []) == []


def test_token_ids_of_numpy_s(llm: LLM) -> None:
    ids = prompt(7)
    expected = llm.generate(ids, GREEDY)[0]
    forms = [np.array(ids), [np.int32(token) for token in ids], {"prompt_token_ids": np.array(ids, dtype=np.uint16)}]
    for form in (*forms, np.array([ids, ids])):
        found = llm.generate(form, GREEDY)[-1]  # type: ignore[arg-type]
        assert found.outputs == expected.outputs and found.prompt_token_ids == ids
        assert all(type(token) is int for token in found.prompt_token_ids)
    with pytest.raises(PromptError, match=r"whole numbers: .*1\.5.* at index 0"):
        llm.generate({"prompt_token_ids": np.array([1.5])})


def test_outputs_in_vllm_s_shape(llm: LLM) -> None:
    first, second = llm.generate([prompt(5)] * 2, SamplingParams(n=2, max_tokens=2))
    assert isinstance(first.request_id, str) and first.request_id != second.request_id
    assert [one.index for one in first.outputs] == [0, 1]
    assert first.outputs[0].cumulative_logprob is None and first.outputs[0].logprobs is None
    assert first.verifier == "exact"


def test_a_synthetic_run_says_so_in_every_output(tiny: Callable[..., Path]) -> None:
    options = {"speculative_config": {"method": "ngram"}, "verifier": "synthetic", "synthetic_rates": [0.5]}
    with LLM(str(tiny("qwen3")), max_model_len=64, **options) as llm:
        assert [one.verifier for one in llm.generate([prompt(5), prompt(6)], GREEDY)] == ["synthetic"] * 2
        assert llm.stream(prompt(5), GREEDY).output.verifier == "synthetic"


def test_the_transformers_tokenizer(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer("né")["input_ids"]) == "né" and tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize("shown", [False, True])
def test_progress_bars(llm: LLM, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([prompt(5)] * 3, GREEDY, use_tqdm=shown)
    assert ("3/3" in capsys.readouterr().err) == shown


def test_no_sampling_params_are_the_defaults(llm: LLM) -> None:
    assert len(llm.generate(prompt(5))[0].outputs[0].token_ids) <= SamplingParams().max_tokens


def test_options_as_a_record_and_as_keywords(driven: LLM, tiny: Callable[..., Path]) -> None:
    path = str(tiny("qwen3"))
    options = driven.engine.resolved.options
    record = EngineOptions(
        model=path, max_model_len=64, distributed_executor_backend=options.distributed_executor_backend
    )
    with LLM.from_options(record) as other:
        assert other.engine.resolved.options == options
    with pytest.raises(OptionError, match="unknown option: modle"):
        EngineOptions.from_kwargs(modle=path)


@pytest.mark.parametrize("where", ["here", "engine process"])
def test_closing_twice_and_serving_no_more(tiny: Callable[..., Path], where: str) -> None:
    llm = LLM(str(tiny("qwen3")), max_model_len=64, **WHERE[where])
    llm.generate(prompt(5), GREEDY)
    llm.close()
    llm.close()
    with pytest.raises(OutriderError):
        llm.generate(prompt(5), GREEDY)


def test_times_are_counted_by_step(driven: LLM) -> None:
    times = driven.engine.times
    before = times.copy()
    driven.generate(prompt(5), GREEDY)
    spent = times.since(before)
    assert spent.steps == 6 and spent.run > 0
    assert times.since(times) == StepTimes()
    assert not issubclass(EngineDeadError, ValueError)


@pytest.mark.parametrize("where", ["here", "engine process"])
def test_conversations(tmp_path: Path, where: str) -> None:
    path = write_tokenizer(write(tmp_path / "chatty"), chat_template=TEMPLATE)
    with LLM(str(path), max_model_len=64, **WHERE[where]) as llm:
        messages = [{"role": "user", "content": "hé"}]
        with pytest.raises(PromptError, match="fails on these messages: division by zero"):
            llm.chat(messages, GREEDY, chat_template_kwargs={"ratio": 0})
        expected = llm.generate("[user]hé[assistant]", GREEDY)[0]
        (found,) = llm.chat(messages, GREEDY)
        assert (found.outputs, found.prompt_token_ids) == (expected.outputs, expected.prompt_token_ids)
        assert [one.outputs for one in llm.chat([messages, messages], GREEDY)] == [expected.outputs] * 2
        (told,) = llm.chat(messages, GREEDY, chat_template_kwargs={"who": "me"})
        assert told.prompt_token_ids == llm.tokenizer.encode("[user]hé[me]")
        with pytest.raises(
            PromptError, match="role must be one of system, developer, user, assistant, tool, function: 'robot'"
        ):
            llm.chat([{"role": "robot", "content": "x"}], GREEDY)
        continued = [*messages, {"role": "assistant", "content": "so"}]
        how = {"add_generation_prompt": False, "continue_final_message": True}
        (continued_one,) = llm.chat(
            continued, GREEDY, chat_template="{% for m in messages %}{{ m.content }};{% endfor %}", **how
        )
        assert continued_one.prompt_token_ids == llm.tokenizer.encode("hé;so")
        with pytest.raises(PromptError, match="shows no tools"):
            llm.chat(messages, GREEDY, tools=[{"type": "function", "function": {"name": "f"}}])
