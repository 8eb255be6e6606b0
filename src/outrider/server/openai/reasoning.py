"""Reasoning that a model writes before its answer, separated as the text comes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from outrider.server.openai.tool_calls import partial

OPEN, CLOSE = "<think>", "</think>"
TAGS = (OPEN, CLOSE)


class ThinkParser:
    """`<think>reasoning</think>answer`, where the tag opens the text or has been opened by the prompt.

    White space inside the tags, and after the closing one, is dropped. Where the tag never closes, all is reasoning;
    a later tag is text.
    """

    def __init__(self, is_open: bool = False) -> None:
        """`is_open`: whether the prompt ends with the opening tag."""
        self._step = self._reasoning_start if is_open else self._start
        self._buffer = ""
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and content that the text so far makes certain and that were not given out before."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._take()

    def finish(self) -> tuple[str, str]:
        """What is left when no more text comes."""
        is_reasoning = self._step in (self._reasoning_start, self._inside)
        (self._reasoning if is_reasoning else self._content).append(self._buffer)
        self._buffer = ""
        return self._take()

    def _take(self) -> tuple[str, str]:
        reasoning, content = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return reasoning, content

    def _start(self) -> bool:
        ahead = self._buffer.lstrip()
        if ahead.startswith(OPEN):
            self._buffer = ahead.removeprefix(OPEN)
            self._step = self._reasoning_start
            return True
        if OPEN.startswith(ahead):
            return False
        self._step = self._answer
        return True

    def _reasoning_start(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._step = self._inside
        return bool(self._buffer)

    def _inside(self) -> bool:
        before, tag, after = self._buffer.partition(CLOSE)
        if tag:
            self._reasoning.append(before.rstrip())
            self._buffer = after
            self._step = self._answer_start
            return True
        end = len(self._buffer[: len(self._buffer) - partial(self._buffer, CLOSE)].rstrip())
        self._reasoning.append(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _answer_start(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._step = self._answer
        return bool(self._buffer)

    def _answer(self) -> bool:
        self._content.append(self._buffer)
        self._buffer = ""
        return False


def num_reasoning_tokens(ids: Sequence[int], closing_token: int | None, decode: Callable[[Sequence[int]], str]) -> int:
    """Tokens of a completion that reasons, up to the one that closes the reasoning; all, if none does.

    `closing_token`: the closing tag, where it is one token; `decode` gives the text of some tokens, tags included.
    """
    if closing_token is not None and closing_token in ids:
        return ids.index(closing_token) + 1
    if CLOSE not in decode(ids):
        return len(ids)
    return bisect_left(range(len(ids) + 1), True, key=lambda count: CLOSE in decode(ids[:count]))
