"""Tool calls in the text of a completion, found as the text comes.

A call is given out when it is whole and right: a JSON object of the model's own form that names a tool of the request.
What is not stays text, to the letter. So what is found does not depend on how the text was cut into pieces, and no call
is ever begun that turns out to be none. White space next to a call is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec

_SPACE = " \t\n\r"
_BETWEEN = frozenset(_SPACE + '{}[],:"0123456789.+-eEtrufalsn')
"""What is outside the strings of JSON."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the request's tools."""

    name: str
    arguments: str  # a JSON object, as the model wrote it


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _HermesCall(_Call):
    arguments: msgspec.Raw


class _LlamaCall(_Call):
    parameters: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] = "function"


class _ObjectScan:
    """Where a JSON object ends, in a text that grows. What it holds is left to a decoder."""

    def __init__(self, start: int) -> None:
        self.at = start
        self._depth = 0
        self._in_string = self._escaped = False

    def advance(self, text: str) -> bool | None:
        """True: `at` is behind the object; False: `at` is at what no object can hold; None: more is needed."""
        while self.at < len(text):
            char = text[self.at]
            if self._in_string:
                if char < " ":
                    return False
                if not self._escaped and char == '"':
                    self._in_string = False
                self._escaped = not self._escaped and char == "\\"
            elif self._depth == 0 and char != "{":
                if char not in _SPACE:
                    return False
            elif char not in _BETWEEN:
                return False
            else:
                self._in_string = char == '"'
                self._depth += (char in "{[") - (char in "}]")
                if self._depth == 0:
                    self.at += 1
                    return True
            self.at += 1
        return None


class ToolCallParser(ABC):
    """One completion's text, in; its content and its calls, in order, out."""

    tags: ClassVar[tuple[str, ...]]
    """What the model writes around calls: a tokenizer may have made special tokens of them."""

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        """`names`: of the request's tools; `max_calls`: calls after which the rest of the text is dropped."""
        self._names, self._max_calls = frozenset(names), max_calls
        self._buffer = ""  # not given out yet; while a call is scanned, it begins with what precedes its object
        self._scan: _ObjectScan | None = None
        self._start = 0  # of the object being scanned
        self._found: list[str | ToolCall] = []
        self.num_calls = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """What the text so far makes certain and was not given out before."""
        self._buffer += text
        while self._buffer and self._advance():
            pass
        found, self._found = self._found, []
        return found

    def finish(self) -> list[str | ToolCall]:
        """What is left when no more text comes: a call cut short is text."""
        self._emit(len(self._buffer))
        found, self._found = self._found, []
        return found

    def _advance(self) -> bool:
        """One step through the buffer; False: only more text can help."""
        if self.num_calls == self._max_calls:
            self._buffer = ""
            return False
        if self._scan is None:
            return self._seek()
        whole = self._scan.advance(self._buffer)
        if whole is None:
            return False
        end, self._scan = self._scan.at, None
        call = self._call(self._buffer[self._start : end]) if whole else None
        if call is None:
            self._emit(end)
            self._failed()
        else:
            self._found.append(call)
            self.num_calls += 1
            self._buffer = self._buffer[end:]
            self._called()
        return True

    def _begin(self, start: int) -> bool:
        """An object may begin at `start` of the buffer."""
        self._start = start
        self._scan = _ObjectScan(start)
        return True

    def _emit(self, end: int) -> None:
        """Text up to `end` is text."""
        if end:
            self._found.append(self._buffer[:end])
            self._buffer = self._buffer[end:]

    def _call(self, text: str) -> ToolCall | None:
        try:
            name, arguments = self._decode(text)
            written = bytes(arguments).decode()
            if written.startswith('"'):  # an object as text, as some models write it
                written = msgspec.json.decode(written, type=str)
            msgspec.json.decode(written, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return None
        return ToolCall(name, written) if name in self._names else None

    @abstractmethod
    def _decode(self, text: str) -> tuple[str, msgspec.Raw]:
        """Name and arguments. DecodeError for what is no call."""

    @abstractmethod
    def _seek(self) -> bool:
        """Looks for where a call may begin; as `_advance`."""

    def _called(self) -> None:  # noqa: B027 - a hook, not a duty
        """A call has ended; another may follow."""

    def _failed(self) -> None:  # noqa: B027 - a hook, not a duty
        """What looked like a call was none, and was given out as text; the next may be one."""


class HermesParser(ToolCallParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere: Hermes, Qwen2.5, Qwen3.

    A closing tag is dropped where there is one; models leave the last one out.
    """

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"
    tags = (_OPEN, _CLOSE)

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        super().__init__(names, max_calls)
        self._closes = False  # a call has just ended, and its tag may follow
        self._is_after = False  # and white space is still its own

    def _decode(self, text: str) -> tuple[str, msgspec.Raw]:
        call = msgspec.json.decode(text, type=_HermesCall)
        return call.name, call.arguments

    def _seek(self) -> bool:
        if self._is_after:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return False
            if self._closes:
                if self._buffer.startswith(self._CLOSE):
                    self._buffer = self._buffer.removeprefix(self._CLOSE)
                    self._closes = False
                    return True
                if self._CLOSE.startswith(self._buffer):
                    return False
            self._is_after = self._closes = False
        at = self._buffer.find(self._OPEN)
        if at >= 0:
            self._emit(len(self._buffer[:at].rstrip()))
            return self._begin(self._buffer.index(self._OPEN) + len(self._OPEN))
        self._emit(len(self._buffer[: len(self._buffer) - partial(self._buffer, self._OPEN)].rstrip()))
        return False

    def _called(self) -> None:
        self._is_after = self._closes = True


class LlamaParser(ToolCallParser):
    """`{"name": ..., "parameters": {...}}` as the whole of an answer: Llama 3.1 and 3.2.

    `<|python_tag|>` may precede it, and further calls may follow, with or without a semicolon between.
    """

    _TAG = "<|python_tag|>"
    tags = (_TAG,)

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        super().__init__(names, max_calls)
        self._is_text = False  # no call can follow

    def _decode(self, text: str) -> tuple[str, msgspec.Raw]:
        call = msgspec.json.decode(text, type=_LlamaCall)
        given = [one for one in (call.parameters, call.arguments) if not isinstance(one, msgspec.UnsetType)]
        if len(given) != 1:
            raise msgspec.ValidationError("one of parameters and arguments is needed")
        return call.name, given[0]

    def _seek(self) -> bool:
        if self._is_text:
            self._emit(len(self._buffer))
            return False
        if self.num_calls:
            self._buffer = self._buffer.lstrip()
        ahead = self._buffer.lstrip()
        if self.num_calls:
            ahead = ahead.removeprefix(";").lstrip()
        start = len(self._buffer) - len(ahead)
        if ahead.startswith("{"):
            return self._begin(start)
        if ahead.startswith(self._TAG):
            return self._begin(start + len(self._TAG))
        self._is_text = not self._TAG.startswith(ahead)
        return self._is_text

    def _failed(self) -> None:
        self._is_text = True


PARSERS: dict[str, type[ToolCallParser]] = {"hermes": HermesParser, "llama": LlamaParser}
"""By the names that `--tool-call-parser` takes."""


def partial(text: str, tag: str) -> int:
    """Length of the longest end of a text that begins a tag, and is not all of it."""
    longest = min(len(tag) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(tag[:length])), 0)
