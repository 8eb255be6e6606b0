"""What several files say is taken from all of them, or from one that is named, and never in silence."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import EOS, prompt, write, write_tokenizer
from outrider import LLM, SamplingParams
from outrider.config import resolve
from outrider.errors import CheckpointError, OptionError
from outrider.load.facts import end_of_text, sampling_defaults
from outrider.options import EngineOptions

CHAT_END = 2


def put(path: Path, name: str, **values: Any) -> None:
    """Sets values of a JSON file, which may be new."""
    file = path / name
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**held, **values}))


@pytest.fixture
def path(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """Config and tokenizer of a checkpoint, without weights; its tokenizer's end of text is token 256."""
    (tmp_path / "config.json").write_text((tiny("qwen3") / "config.json").read_text())
    write_tokenizer(tmp_path)
    return tmp_path


def ends(path: Path) -> tuple[int, ...]:
    return resolve(EngineOptions(model=str(path), load_format="dummy", device="cpu")).eos_token_ids


def test_the_end_of_text_is_what_all_places_say(path: Path) -> None:
    assert ends(path) == (EOS,)
    put(path, "config.json", eos_token_id=7)
    put(path, "generation_config.json", eos_token_id=[7, 9])
    assert ends(path) == (7, 9, EOS)
    put(path, "tokenizer_config.json", eot_token="!")
    assert ends(path)[:3] == (7, 9, EOS) and len(ends(path)) == 4
    _, fact = end_of_text(path, json.loads((path / "config.json").read_text()), 260)
    assert fact.said["generation_config.json"] == [7, 9] and fact.note is None


@pytest.mark.parametrize("written", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens", "vocab", "pieces"])
def test_a_token_is_found_wherever_the_tokenizer_has_it(path: Path, written: Any, place: str) -> None:
    put(path, "config.json", eos_token_id=0)
    (path / "tokenizer.json").unlink()
    files: dict[str, tuple[str, dict[str, Any]]] = {
        "added_tokens_decoder": ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}}),
        "added_tokens": ("tokenizer.json", {"added_tokens": [{"id": 2, "content": "<|im_end|>"}]}),
        "vocab": ("tokenizer.json", {"model": {"vocab": {"a": 0, "<|im_end|>": 2}}}),
        "pieces": ("tokenizer.json", {"model": {"vocab": [["a", 0.0], ["b", -1.0], ["<|im_end|>", -2.0]]}}),
    }
    (path / "tokenizer_config.json").write_text("{}")
    name, values = files[place]
    put(path, name, **values)
    put(path, "tokenizer_config.json", eos_token=written)
    assert ends(path) == (0, CHAT_END)


def test_a_chat_ends_where_only_the_tokenizer_says_so(tmp_path: Path) -> None:
    # config.json and generation_config.json say token 0; some token of a greedy text is the tokenizer's end
    write(tmp_path, eos_token_id=0)
    write_tokenizer(tmp_path)
    given = {"prompt_token_ids": prompt(12)}
    greedy = SamplingParams(temperature=0.0, max_tokens=30, detokenize=False)
    with LLM(str(tmp_path)) as llm:
        tokens = llm.generate(given, greedy)[0].outputs[0].token_ids
    last = tokens[3]
    letter = next(
        entry for entry, token in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].items()
        if token == last
    )  # fmt: skip
    put(tmp_path, "tokenizer_config.json", eos_token=letter)
    with LLM(str(tmp_path)) as llm:
        output = llm.generate(given, greedy)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (tokens[: tokens.index(last) + 1], "stop")


def test_an_end_that_cannot_come_is_said(path: Path) -> None:
    put(path, "generation_config.json", eos_token_id=[1, 999])
    put(path, "tokenizer_config.json", eos_token="<gone>")
    (path / "special_tokens_map.json").unlink(missing_ok=True)
    taken, fact = end_of_text(path, {}, 260)
    assert taken == (1,)
    assert fact.note is not None and "999 is outside" in fact.note and "'<gone>'" in fact.note


@pytest.mark.parametrize("value", [1.5, -1, "x", [True], [[1]], 2**40])
def test_ends_that_are_none(path: Path, value: Any) -> None:
    put(path, "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be token ids"):
        ends(path)


def test_too_many_ends(path: Path) -> None:
    put(path, "generation_config.json", eos_token_id=list(range(20)))
    with pytest.raises(CheckpointError, match="21 end-of-text tokens: at most 16"):
        ends(path)


QWEN3 = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}


def test_sampling_defaults_are_used_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    write_tokenizer(tmp_path)
    put(tmp_path, "generation_config.json", **QWEN3, repetition_penalty=1.05)
    monkeypatch.setattr(logging.getLogger("outrider"), "propagate", True)
    expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    with caplog.at_level(logging.WARNING, "outrider"), LLM(str(tmp_path)) as llm:
        assert llm.get_default_sampling_params() == expected
        taken = []
        add = llm.engine.add
        monkeypatch.setattr(llm.engine, "add", lambda *given, **named: taken.append(given[2]) or add(*given, **named))
        given = {"prompt_token_ids": prompt(9)}
        llm.generate(given)
        list(llm.stream(given))
        llm.generate(given, SamplingParams(temperature=0.0))
        assert taken == [expected, expected, SamplingParams(temperature=0.0)]
    said = [record.getMessage() for record in caplog.records if "temperature 0.6" in record.getMessage()]
    assert len(said) == 1 and "top_k 20" in said[0] and "repetition_penalty 1.05" in said[0], caplog.records


def test_sampling_defaults_can_be_turned_off(path: Path) -> None:
    put(path, "generation_config.json", **QWEN3)
    off = resolve(EngineOptions(model=str(path), load_format="dummy", device="cpu", generation_config="none"))
    assert off.sampling_defaults == {}
    on = resolve(EngineOptions(model=str(path), load_format="dummy", device="cpu"))
    assert on.sampling_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    with pytest.raises(OptionError, match="generation_config"):
        resolve(EngineOptions(model=str(path), load_format="dummy", generation_config="nnoe"))


def test_a_sampling_default_that_no_request_could_have(path: Path) -> None:
    put(path, "generation_config.json", temperature=-1)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature must be .*none"):
        sampling_defaults(path, used=True)
    assert sampling_defaults(path, used=False)[0] == {}
