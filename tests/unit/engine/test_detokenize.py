"""One token at a time gives the text that all at once give."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import EOS
from outrider.engine.detokenize import Detokenizer
from outrider.load.tokenizer import Tokenizer

TEXTS = [
    "plain",
    "né à Zürich",
    "日本語のテキスト",
    "a😀b👩‍👩‍👧c",
    " leading and trailing ",
    "\n\ttabs\r\n",
    "́combining",
]
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(tiny("qwen3"))


def detokenizer(
    tokenizer: Tokenizer, prompt: str = "x", stop: tuple[str, ...] = (), include: bool = False
) -> Detokenizer:
    return Detokenizer(tokenizer, tokenizer.encode(prompt), stop, include, True)


@pytest.mark.parametrize("prompt", ["", "x", "prompt é"])
@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    found = detokenizer(tokenizer, prompt)
    streamed = ""
    for token in tokenizer.encode(text):
        assert not found.append(token)
        piece = found.stream(finished=False)
        assert "�" not in piece, "a character was written before it was complete"
        streamed += piece
    found.finish()
    assert found.text == streamed + found.stream(finished=True) == text


@SETTINGS
@given(ids=st.lists(st.integers(0, 256), max_size=40), prompt=st.text("ab é", max_size=6))
def test_any_tokens(tokenizer: Tokenizer, ids: list[int], prompt: str) -> None:
    found = detokenizer(tokenizer, prompt)
    for token in ids:
        found.append(token)
    found.finish()
    assert found.text == tokenizer.decode(ids)


def test_a_character_that_the_prompt_began(tokenizer: Tokenizer) -> None:
    # the text is the output's: nothing of the prompt may come out again
    whole = tokenizer.encode("abé")
    found = Detokenizer(tokenizer, whole[:-1], (), False, True)
    found.append(whole[-1])
    for token in tokenizer.encode("z"):
        found.append(token)
    found.finish()
    assert found.text.endswith("z") and "ab" not in found.text


def test_a_character_cut_short(tokenizer: Tokenizer) -> None:
    found = detokenizer(tokenizer)
    for token in tokenizer.encode("né")[:-1]:
        found.append(token)
    assert found.text == "n"
    found.finish()
    assert found.text == "n�"


@SETTINGS
@given(
    text=st.text("abé", max_size=20),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: list[str], include: bool) -> None:
    found = detokenizer(tokenizer, stop=stop, include=include)
    streamed, stopped = "", False
    for token in tokenizer.encode(text):
        stopped = found.append(token)
        streamed += found.stream(finished=stopped)
        if stopped:
            break
    found.finish()
    streamed += found.stream(finished=True)
    # the first to be complete ends the text; of those complete at once, the one that begins first
    ends = sorted((text.index(one) + len(one), text.index(one), one) for one in stop if one in text)
    assert stopped == bool(ends)
    expected = text
    if ends:
        _, start, reason = ends[0]
        assert found.stop_reason == reason or text.startswith(reason, start)
        expected = text[: ends[0][0]] if include else text[:start]
    assert found.text == streamed == expected


def test_special_tokens(tokenizer: Tokenizer) -> None:
    for skip, expected in ((True, "ab"), (False, "a<eos>b")):
        found = Detokenizer(tokenizer, [], (), False, skip)
        for token in (*tokenizer.encode("a"), EOS, *tokenizer.encode("b")):
            found.append(token)
        assert found.text == expected


def test_a_token_costs_the_same_however_long_the_text_is(tokenizer: Tokenizer) -> None:
    def seconds(num_tokens: int) -> float:
        found = detokenizer(tokenizer, stop=("never there",))
        tokens = tokenizer.encode("some text ")
        start = time.process_time()
        for number in range(num_tokens):
            found.append(tokens[number % len(tokens)])
            found.stream(finished=False)
        return time.process_time() - start

    short, long = min(seconds(10_000) for _ in range(3)), seconds(200_000)
    assert long < 20 * 3 * short


def test_text_that_is_read_while_more_is_handed_out_is_whole(tokenizer: Tokenizer) -> None:
    found = detokenizer(tokenizer)
    first, *others = tokenizer.encode("some text")

    def hand_out() -> None:
        for token in others:
            found.append(token)
            found.stream(finished=False)

    other = threading.Thread(target=hand_out)

    class Interrupted(list[str]):
        def clear(self) -> None:
            other.start()
            other.join(0.2)
            super().clear()

    found.append(first)
    found._streamed = Interrupted([found.stream(finished=False)])
    assert "some text".startswith(found.text)
    other.join()
    found._streamed = list(found._streamed)
    assert found.text == "some text"
