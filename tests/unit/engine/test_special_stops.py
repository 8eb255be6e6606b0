"""Stop strings that are special tokens, or hold some: the text leaves those out, and they are found all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import HERMES_TEMPLATE, fake_server, write_tokenizer
from outrider.core.output import AcceptanceTally, FinishReason, TokenDelta
from outrider.core.sampling import MAX_STOP_IDS, SamplingParams
from outrider.engine.detokenize import Detokenizer
from outrider.engine.generation import Generation
from outrider.load.tokenizer import Tokenizer

SPECIAL = ("<|im_end|>", "<|im_start|>", "<|tool|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("special"), HERMES_TEMPLATE, SPECIAL))


def completed(tokenizer: Tokenizer, text: str, **how: Any) -> tuple[str, Any, bool, int]:
    """Text, stop reason, whether it stopped, and its tokens, for tokens that come one at a time."""
    params = SamplingParams(max_tokens=None, **how).stopping_at(tokenizer.special_tokens, 10**6)
    generation = Generation([(None, [65])], [params], eos_token_ids=[], verifier="exact")
    generation.detokenize(lambda prompt, own: Detokenizer.of(tokenizer, prompt, own))
    (completion,) = generation.completions
    streamed, stopped = "", False
    for token in tokenizer.encode(text, add_special_tokens=False):
        at_id = token in (params.stop_token_ids or ()) and len(completion.output.token_ids) >= params.min_tokens
        reason = FinishReason.STOP if at_id else None
        delta = TokenDelta("0", (token,), 0, reason, token if at_id else None)
        stopped = completion.take(delta, AcceptanceTally(), 0) or at_id
        if stopped:
            break
    streamed = "".join(piece.text for piece in generation.inbox.pieces)
    if stopped:
        assert streamed == completion.output.text
    return completion.output.text, completion.output.stop_reason, stopped, len(completion.output.token_ids)


TURN = "Yes.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_end|>", "Yes."),
        (["never", "<|im_end|>"], "Yes."),
        ("<|im_end|>\n", "Yes."),
        ("s.<|im_end|>", "Ye"),
        ("<|im_end|>\n<|im_start|>", "Yes."),
        ("\n<|im_start|>user", "Yes.<|im_end|>"),
        (["<|im_start|>", "Yes.<|im_end|>\n<"], ""),
    ],
)
def test_they_end_the_text(tokenizer: Tokenizer, stop: Any, text: str, skip: bool) -> None:
    """Bug 6: they were looked for in a text that leaves them out."""
    listed = [stop] if isinstance(stop, str) else stop
    found, reason, stopped, _ = completed(tokenizer, TURN, stop=stop, ignore_eos=True, skip_special_tokens=skip)
    assert stopped and reason in listed
    expected = text.replace("<|im_end|>", "") if skip else text
    assert found == expected
    kept, reason, _, _ = completed(
        tokenizer, TURN, stop=stop, skip_special_tokens=skip, include_stop_str_in_output=True
    )
    assert kept == found + reason


@pytest.mark.parametrize("special_twice", ["<|im_end|>", "<|tool|>"])
def test_other_special_tokens_stay_out_of_the_text(tokenizer: Tokenizer, special_twice: str) -> None:
    text = f"a{special_twice}b<|im_start|>c\nd"
    assert completed(tokenizer, text, stop=[f"{special_twice}x", "\n"])[:2] == ("abc", "\n")
    assert completed(tokenizer, text, stop=["\n"])[:2] == ("abc", "\n")


def test_part_of_a_special_token_is_only_text(tokenizer: Tokenizer) -> None:
    """The negative control: what the text does not show is not found unless the stop string names it whole."""
    assert not completed(tokenizer, "Yes.<|im_end|>", stop="im_end")[2]
    assert completed(tokenizer, "Yes.<|im_end|>", stop="im_end", skip_special_tokens=False)[2]


def test_the_engine_is_told(tokenizer: Tokenizer) -> None:
    ids = tokenizer.special_tokens
    params = SamplingParams(stop=["<|im_end|>", "x", "<|tool|>y"], stop_token_ids=[3])
    assert params.stopping_at(ids, 10**6).stop_token_ids == (3, ids["<|im_end|>"])
    assert params.stopping_at(ids, 200).stop_token_ids == (3,), "the model has no such token"
    many = {f"<{number}>": number for number in range(40)}
    assert len(SamplingParams(stop=list(many)).stopping_at(many, 99).stop_token_ids or ()) == MAX_STOP_IDS
    assert SamplingParams(stop="x").stopping_at(ids, 10**6).stop_token_ids == ()


def test_before_min_tokens_they_end_nothing(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>b<|im_end|>"
    assert completed(tokenizer, text, stop="<|im_end|>", min_tokens=3) == ("ab", "<|im_end|>", True, 4)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("responses", {"input": "x"}),
    ],
)
def test_over_http(tmp_path: Path, path: str, asked: dict[str, Any]) -> None:
    with fake_server(write_tokenizer(tmp_path, HERMES_TEMPLATE, SPECIAL)) as (url, engine):
        engine.says = [TURN]
        answer = httpx.post(f"{url}/v1/{path}", json={**asked, "stop": ["<|im_end|>\n"], "ignore_eos": True}).json()
    if path == "responses":
        assert answer["output"][0]["content"][0]["text"] == "Yes."
    else:
        (choice,) = answer["choices"]
        assert choice["stop_reason"] == "<|im_end|>\n" and choice["finish_reason"] == "stop"
        assert (choice["text"] if path == "completions" else choice["message"]["content"]) == "Yes."
