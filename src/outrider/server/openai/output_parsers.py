"""How the served model writes tool calls and reasoning, and what its chat template shows it of tools.

Nothing is taken on trust: the template is asked to write a conversation with tools, and what it writes is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.errors import FieldError, OptionError, PromptError
from outrider.load.tokenizer import Tokenizer
from outrider.server.openai.reasoning import CLOSE, OPEN, TAGS, ThinkParser, num_reasoning_tokens
from outrider.server.openai.tool_calls import PARSERS, ToolCall, ToolCallParser
from outrider.server.options import TOOL_CALL_PARSERS

_NAME, _KEY, _VALUE, _RESULT = "outrider_probe", "probed_key", "probed_value", "probed_result"
_USER = {"role": "user", "content": "x"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "x",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "x"}}},
    },
}
_CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "probe1234", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}],
}
_ANSWER = {"role": "tool", "tool_call_id": "probe1234", "content": _RESULT}

PROMPT_END = 16
"""Tokens of a prompt in which an opening tag at its end is looked for."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of a reply's reasoning."""

    text: str


Part = Reasoning | ToolCall | str
"""Of a reply: a piece of its reasoning, a whole call, or a piece of its content."""


class ReplyParser:
    """One completion's text as the parts of an assistant's message."""

    def __init__(self, think: ThinkParser | None, tools: ToolCallParser | None) -> None:
        self._think, self._tools = think, tools
        self.has_reasoning = self.has_content = False
        """Whether there was any so far."""

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._tools.num_calls if self._tools is not None else 0

    def feed(self, text: str, finished: bool = False) -> list[Part]:
        """What the text so far makes certain, in order; with `finished`, all that is left."""
        reasoning, content = self._think.feed(text) if self._think is not None else ("", text)
        if finished and self._think is not None:
            more_reasoning, more_content = self._think.finish()
            reasoning, content = reasoning + more_reasoning, content + more_content
        parts: list[Part] = [Reasoning(reasoning)] if reasoning else []
        if self._tools is not None:
            parts += self._tools.feed(content)
            parts += self._tools.finish() if finished else []
        elif content:
            parts.append(content)
        self.has_reasoning |= bool(reasoning)
        self.has_content |= any(isinstance(part, str) for part in parts)
        return parts


class OutputParsers:
    """What one model's tokenizer and template make of tools and reasoning."""

    def __init__(self, tokenizer: Tokenizer, tool_call_parser: str | None, reasoning_parser: str | None) -> None:
        """The parsers as the options name them. OptionError for a parser of calls where no tools can be shown."""
        self._tokenizer = tokenizer
        shown = self._rendered([_USER], tools=[_TOOL])
        called = self._rendered([_USER, _CALLS])
        answered = self._rendered([_USER, _CALLS, _ANSWER])
        self._shows_tools = _NAME in shown and _KEY in shown
        self._shows_calls = _NAME in called and _VALUE in called
        self._shows_results = _RESULT in answered
        if tool_call_parser is None:
            tool_call_parser = self._inferred(called)
        elif not self._shows_tools:
            raise OptionError(
                f"tool_call_parser {tool_call_parser} needs a chat template that shows tools, and the model has none:"
                " leave it out"
            )
        self.tool_call_parser = tool_call_parser
        """The name of the parser of calls; None: requests with tools are refused."""
        self.reasons = reasoning_parser is not None
        """Whether reasoning is separated from content."""
        added = tokenizer.wrapped.added_tokens_decoder.values()
        self._special = frozenset(token.content for token in added if token.special)
        self._closing_token: int | None = tokenizer.wrapped.get_vocab().get(CLOSE)

    def _rendered(self, messages: Sequence[dict[str, Any]], **more: Any) -> str:
        """What the template writes; nothing where it refuses."""
        from jinja2 import TemplateError

        if self._tokenizer.wrapped.chat_template is None:
            return ""
        try:
            text: str = self._tokenizer.wrapped.apply_chat_template(list(messages), tokenize=False, **more)
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError):
            return ""
        return text

    def _inferred(self, called: str) -> str | None:
        """The parser that reads back the call which the template wrote, if one does."""
        asked = self._rendered([_USER], add_generation_prompt=True)
        for name in TOOL_CALL_PARSERS:
            parser = ReplyParser(ThinkParser(), PARSERS[name]([_NAME]))  # Qwen3's writes empty reasoning before a call
            found = parser.feed(called.removeprefix(asked), finished=True)
            if found and isinstance(found[0], ToolCall):
                return name
        return None

    def check_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises PromptError for calls and results that the template would leave out."""
        for index, message in enumerate(messages):
            if message.get("tool_calls") and not self._shows_calls:
                said = "the model's chat template shows no tool calls: leave them out"
                raise PromptError(said, f"messages.{index}.tool_calls")
            if message["role"] == "tool" and not self._shows_results:
                raise PromptError("the model's chat template shows no tool results: leave it out", f"messages.{index}")

    def check_tools(self) -> None:
        """Raises FieldError if requests cannot have tools."""
        if not self._shows_tools:
            raise FieldError("the model's chat template shows no tools: leave them out", "tools")
        if self.tool_call_parser is None:
            known = " or ".join(TOOL_CALL_PARSERS)
            raise FieldError(
                f"how the model writes tool calls is unknown: start the server with --tool-call-parser {known}", "tools"
            )

    def hides(self, with_tools: bool) -> str | None:
        """A tag that the text must hold for the parsers to find it, and which the tokenizer leaves out as special."""
        tags: tuple[str, ...] = TAGS if self.reasons else ()
        if with_tools and self.tool_call_parser is not None:
            tags += PARSERS[self.tool_call_parser].tags
        return next((tag for tag in tags if tag in self._special), None)

    def reply(self, prompt: Sequence[int], tool_names: Collection[str], max_calls: int | None) -> ReplyParser:
        """What reads a completion of this prompt; with no tools, no calls are looked for."""
        think = tools = None
        if self.reasons:
            end = self._tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=False)
            think = ThinkParser(is_open=end.rstrip().endswith(OPEN))
        if tool_names and self.tool_call_parser is not None:
            tools = PARSERS[self.tool_call_parser](tool_names, max_calls)
        return ReplyParser(think, tools)

    def num_reasoning_tokens(self, ids: Sequence[int]) -> int:
        """Tokens of a completion that reasons which are reasoning, tags included."""
        return num_reasoning_tokens(
            ids, self._closing_token, lambda some: self._tokenizer.decode(some, skip_special_tokens=False)
        )
