"""Tool calls and reasoning in text: the same is found however the text is cut, and what is no call stays text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.server.openai.output_parsers import Part, Reasoning, ReplyParser
from outrider.server.openai.reasoning import ThinkParser, num_reasoning_tokens
from outrider.server.openai.tool_calls import PARSERS, HermesParser, LlamaParser, ToolCall, ToolCallParser
from outrider.server.options import REASONING_PARSERS, TOOL_CALL_PARSERS

NAMES = ("get_weather", "f")
PARIS = '{"city": "Paris", "days": [1, 2.5e3, null, true]}'
WEATHER = ToolCall("get_weather", PARIS)


def merged(parts: Sequence[Part]) -> list[Part]:
    """The same parts, with neighbours of one kind joined."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        else:
            found.append(part)
    return found


def calls(parser: ToolCallParser, *pieces: str) -> list[Part]:
    parts: list[Part] = [part for piece in pieces for part in parser.feed(piece)]
    assert parser.feed("") == []
    return merged([*parts, *parser.finish()])


def hermes(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


GOOD = f'{{"name": "get_weather", "arguments": {PARIS}}}'
TRICKY = '{"name": "f", "arguments": {"text": "a \\" \\\\ } </tool_call> <tool_call> {"}}'
TRICKY_CALL = ToolCall("f", '{"text": "a \\" \\\\ } </tool_call> <tool_call> {"}')
HERMES: dict[str, tuple[str, list[Part]]] = {
    "text": ("Hello <there>, a < b.\n", ["Hello <there>, a < b.\n"]),
    "call": (hermes(GOOD), [WEATHER]),
    "call-after-text": (f"Let me see.\n\n{hermes(GOOD)}\n", ["Let me see.", WEATHER]),
    "two": (f"{hermes(GOOD)}\n{hermes(TRICKY)}", [WEATHER, TRICKY_CALL]),
    "on-one-line": (f"<tool_call>{GOOD}</tool_call><tool_call>{GOOD}</tool_call>", [WEATHER, WEATHER]),
    "text-after": (f"{hermes(GOOD)} Done.", [WEATHER, "Done."]),
    "not-closed": (f"<tool_call>\n{GOOD}", [WEATHER]),
    "half-closed": (f"<tool_call>{GOOD}</tool_", [WEATHER, "</tool_"]),
    "arguments-as-text": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [ToolCall("f", '{"a": 1}')],
    ),
    "other-order": ('<tool_call>{"arguments": {}, "name": "f"}</tool_call>', [ToolCall("f", "{}")]),
    "unicode": ('<tool_call>{"name": "f", "arguments": {"a": "né"}}</tool_call>', [ToolCall("f", '{"a": "né"}')]),
    "backslash": (hermes('{"name": "f", "arguments": {"a": "C:\\\\"}}'), [ToolCall("f", '{"a": "C:\\\\"}')]),
    "after-a-bad-one": (f"<tool_call>oops {hermes(GOOD)}", ["<tool_call>oops", WEATHER]),
    "inside-a-bad-one": (f'<tool_call>{{"name": {hermes(GOOD)}', ['<tool_call>{"name": ', WEATHER]),
}
MALFORMED = {
    "cut": hermes(GOOD)[:40],
    "empty": "<tool_call></tool_call>",
    "no-json": hermes("get_weather(Paris)"),
    "list": hermes(f"[{GOOD}]"),
    "unknown-tool": hermes('{"name": "rm", "arguments": {}}'),
    "no-arguments": hermes('{"name": "f"}'),
    "more": hermes('{"name": "f", "arguments": {}, "id": 3}'),
    "arguments-list": hermes('{"name": "f", "arguments": [1]}'),
    "arguments-bad-text": hermes('{"name": "f", "arguments": "x"}'),
    "trailing-comma": hermes('{"name": "f", "arguments": {"a": 1,}}'),
    "nan": hermes('{"name": "f", "arguments": {"a": NaN}}'),
    "single-quotes": hermes("{'name': 'f', 'arguments': {}}"),
    "open-string": hermes('{"name": "f", "arguments": {"a": "x}}'),
    "line-in-a-string": hermes('{"name": "f", "arguments": {"a": "x\ny"}}'),
    "crossed-brackets": hermes('{"name": "f", "arguments": {"a": [1}]}'),
    "half-a-surrogate": hermes('{"name": "f", "arguments": {"a": "\\ud800"}}'),
    "llama": hermes('{"name": "f", "parameters": {}}'),
    "deep": hermes('{"name": "f", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001),
}
LLAMA_GOOD = f'{{"name": "get_weather", "parameters": {PARIS}}}'
LLAMA: dict[str, tuple[str, list[Part]]] = {
    "text": ("It is {warm}.", ["It is {warm}."]),
    "call": (LLAMA_GOOD, [WEATHER]),
    "tag": (f"<|python_tag|>{LLAMA_GOOD}", [WEATHER]),
    "space": (f"\n\n {LLAMA_GOOD}\n", [WEATHER]),
    "type": ('{"type": "function", "name": "f", "parameters": {}}', [ToolCall("f", "{}")]),
    "arguments": (GOOD, [WEATHER]),
    "two": (f"{LLAMA_GOOD}; {LLAMA_GOOD}", [WEATHER, WEATHER]),
    "two-lines": (f"<|python_tag|>{LLAMA_GOOD}\n<|python_tag|>{LLAMA_GOOD}", [WEATHER, WEATHER]),
    "text-after": (f"{LLAMA_GOOD} Done {{}}", [WEATHER, "Done {}"]),
    "not-first": (f"Here: {LLAMA_GOOD}", [f"Here: {LLAMA_GOOD}"]),
    "after-a-bad-one": (f"{{}} {LLAMA_GOOD}", [f"{{}} {LLAMA_GOOD}"]),
    "an-answer-in-json": ('{"city": "Paris"}', ['{"city": "Paris"}']),
    "both": ('{"name": "f", "parameters": {}, "arguments": {}}', ['{"name": "f", "parameters": {}, "arguments": {}}']),
    "neither": ('{"name": "f"}', ['{"name": "f"}']),
    "code": ("<|python_tag|>f.call(1)", ["<|python_tag|>f.call(1)"]),
    "cut": (LLAMA_GOOD[:30], [LLAMA_GOOD[:30]]),
    "half-a-tag": ("<|python", ["<|python"]),
    "white": (" \n", [" \n"]),
}
TEXTS: list[tuple[type[ToolCallParser], str, list[Part]]] = [
    *((HermesParser, text, parts) for text, parts in HERMES.values()),
    *((HermesParser, text, [text]) for text in MALFORMED.values()),
    *((LlamaParser, text, parts) for text, parts in LLAMA.values()),
]


@pytest.mark.parametrize("name", HERMES)
def test_hermes_calls(name: str) -> None:
    text, parts = HERMES[name]
    assert calls(HermesParser(NAMES), text) == parts


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_calls_are_text(name: str) -> None:
    assert calls(HermesParser(NAMES), MALFORMED[name]) == [MALFORMED[name]]
    after = f"{MALFORMED[name]}\n{hermes(GOOD)}"
    if name != "cut":
        assert calls(HermesParser(NAMES), after) == [MALFORMED[name], WEATHER], "one bad call must not hide the next"


@pytest.mark.parametrize("name", LLAMA)
def test_llama_calls(name: str) -> None:
    text, parts = LLAMA[name]
    assert calls(LlamaParser(NAMES), text) == parts


@pytest.mark.parametrize(("parser", "text", "parts"), TEXTS, ids=map(str, range(len(TEXTS))))
def test_a_character_at_a_time(parser: type[ToolCallParser], text: str, parts: list[Part]) -> None:
    assert calls(parser(NAMES), *text) == parts


def test_text_is_told_as_soon_as_it_is_certain() -> None:
    parser = HermesParser(NAMES)
    assert parser.feed("Let me") == ["Let me"]
    assert parser.feed(" see <") == [" see"]
    assert parser.feed("b> \n<tool") == [" <b>"]
    assert parser.feed("_call>" + GOOD[:-1]) == []
    assert parser.feed("}") == [WEATHER]
    assert LlamaParser(NAMES).feed("Hello ") == ["Hello "]


def test_max_calls() -> None:
    assert calls(HermesParser(NAMES, max_calls=1), f"So: {hermes(GOOD)}\n{hermes(TRICKY)} end") == ["So:", WEATHER]
    assert calls(LlamaParser(NAMES, max_calls=1), f"{LLAMA_GOOD}; {LLAMA_GOOD}") == [WEATHER]


def test_options_name_the_parsers_there_are() -> None:
    assert list(PARSERS) == list(TOOL_CALL_PARSERS) and REASONING_PARSERS == ("think",)


REASONED: dict[str, tuple[str, bool, list[Part]]] = {
    "text": ("Hello <thinking> </think>", False, ["Hello <thinking> </think>"]),
    "reasoning": ("<think>\nHm. a < b\n</think>\n\nYes.\n", False, [Reasoning("Hm. a < b"), "Yes.\n"]),
    "space-before": ("\n<think>Hm</think>Yes", False, [Reasoning("Hm"), "Yes"]),
    "opened-by-the-prompt": ("\nHm.\n</think>\nYes.", True, [Reasoning("Hm."), "Yes."]),
    "empty": ("<think>\n\n</think>\n\nYes", False, ["Yes"]),
    "never-closed": ("<think>Hm. Well </thi", False, [Reasoning("Hm. Well </thi")]),
    "only-reasoning": ("Hm.</think>", True, [Reasoning("Hm.")]),
    "later": ("Yes <think>x</think>", False, ["Yes <think>x</think>"]),
    "twice": ("<think>a</think>b<think>c</think>", False, [Reasoning("a"), "b<think>c</think>"]),
    "half-a-tag": ("<thi", False, ["<thi"]),
    "white": (" \n", False, [" \n"]),
    "call": (f"<think>{hermes(GOOD)}</think>\n{hermes(GOOD)}", False, [Reasoning(hermes(GOOD)), WEATHER]),
}


def reply(is_open: bool, *pieces: str) -> list[Part]:
    parser = ReplyParser(ThinkParser(is_open), HermesParser(NAMES))
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.feed("", finished=True)
    assert parser.has_reasoning == any(isinstance(part, Reasoning) for part in parts)
    assert parser.num_calls == sum(isinstance(part, ToolCall) for part in parts)
    return merged(parts)


@pytest.mark.parametrize("name", REASONED)
def test_reasoning(name: str) -> None:
    text, is_open, parts = REASONED[name]
    assert reply(is_open, text) == parts == reply(is_open, *text)
    parser = ReplyParser(ThinkParser(is_open), HermesParser(NAMES))
    assert merged(parser.feed(text, finished=True)) == parts


def test_reasoning_is_told_as_it_comes() -> None:
    parser = ReplyParser(ThinkParser(), None)
    assert parser.feed("<think>") == [] == parser.feed("\n")
    assert parser.feed("One") == [Reasoning("One")]
    assert parser.feed(" two</th") == [Reasoning(" two")]
    assert parser.feed("ink>\nYes") == ["Yes"]


def test_without_parsers_text_is_content() -> None:
    text = f"<think>x</think>{hermes(GOOD)}"
    assert ReplyParser(None, None).feed(text, finished=True) == [text]


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<", "</", "<tool", "think>")
PLAIN = ("{", "}", ";", '"', " ", "\n", "text", "né", "\\", '{"name": "f", "arguments": {')
FRAGMENTS = st.sampled_from([*TAGS, *PLAIN, GOOD, LLAMA_GOOD, TRICKY])
WHOLE = st.lists(FRAGMENTS, max_size=12).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and the same in pieces."""
    text = draw(WHOLE)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
    return text, [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
Read = Callable[[Sequence[str]], list[Part]]
READERS: dict[str, Read] = {
    "hermes": lambda pieces: calls(HermesParser(NAMES), *pieces),
    "hermes-one": lambda pieces: calls(HermesParser(NAMES, max_calls=1), *pieces),
    "llama": lambda pieces: calls(LlamaParser(NAMES), *pieces),
    "reply": lambda pieces: reply(False, *pieces),
    "reply-opened": lambda pieces: reply(True, *pieces),
}


@pytest.mark.parametrize("reader", READERS)
@SETTINGS
@given(cut())
def test_how_a_text_is_cut_makes_no_difference(reader: str, given_text: tuple[str, list[str]]) -> None:
    text, pieces = given_text
    assert READERS[reader](pieces) == READERS[reader]([text])


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
@SETTINGS
@given(WHOLE)
def test_nothing_but_calls_and_space_is_lost(parser: type[ToolCallParser], text: str) -> None:
    parts = calls(parser(NAMES), text)
    kept = "".join(part for part in parts if isinstance(part, str))
    if len(kept) == len("".join(str(part) for part in parts)):
        assert kept == text, "no call, and yet not the same text"
    left = iter("".join(text.split()))
    assert all(letter in left for letter in "".join(kept.split())), (
        "text that the model did not write, or not in this order"
    )


class _Hasty(HermesParser):
    """Looks for whole tags in each piece alone, as a parser may that was tried on whole texts only."""

    def _seek(self) -> bool:
        found = super()._seek()
        if not found:
            self._emit(len(self._buffer))
        return found


def test_the_property_can_fail() -> None:
    def hasty(pieces: Sequence[str]) -> list[Part]:
        return calls(_Hasty(NAMES), *pieces)

    def failures() -> Iterator[bool]:
        for _, text, _ in TEXTS:
            yield from (hasty([text[:place], text[place:]]) != hasty([text]) for place in range(1, min(len(text), 60)))

    assert any(failures())


@pytest.mark.parametrize("closing_token", [None, 7])
def test_reasoning_tokens_are_counted_up_to_the_closing_tag(closing_token: int | None) -> None:
    words = {1: "<think>", 2: "a", 3: "b", 4: "</th", 5: "ink>", 6: " x", 7: "</think>"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[token] for token in ids)

    assert num_reasoning_tokens([1, 2, 3, 4, 5, 6, 2], closing_token, decode) == 5
    assert num_reasoning_tokens([1, 2, 7, 6, 2], closing_token, decode) == 3
    assert num_reasoning_tokens([1, 2, 7], closing_token, decode) == 3
    assert num_reasoning_tokens([1, 2, 3, 4], closing_token, decode) == 4, "never closed"
