"""How the served model writes tool calls and reasoning, as its chat template and the options say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from outrider.errors import FieldError, OptionError
from outrider.load.chat_template import CALLED, ChatTemplate
from outrider.load.tokenizer import Tokenizer
from outrider.server.openai.reasoning import CLOSE, OPEN, TAGS, ThinkParser, num_reasoning_tokens
from outrider.server.openai.tool_calls import PARSERS, ToolCall, ToolCallParser
from outrider.server.options import TOOL_CALL_PARSERS

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

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,  # of requests with tools
        tool_call_parser: str | None,
        reasoning_parser: str | None,
    ) -> None:
        """The parsers as the options name them. OptionError for a parser of calls where no tools can be shown."""
        self._tokenizer = tokenizer
        self._shows_tools = template is not None and template.shows_tools
        if tool_call_parser is None:
            tool_call_parser = _inferred(template) if template is not None else None
        elif not self._shows_tools:
            raise OptionError(
                f"tool_call_parser {tool_call_parser} needs a chat template that shows tools, and the model has none:"
                " leave it out"
            )
        self.tool_call_parser = tool_call_parser
        """The name of the parser of calls; None: requests with tools are refused."""
        self.reasons = reasoning_parser is not None
        """Whether reasoning is separated from content."""
        self._closing_token: int | None = tokenizer.backend.token_to_id(CLOSE)

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
        return next((tag for tag in tags if tag in self._tokenizer.special_tokens), None)

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


def _inferred(template: ChatTemplate) -> str | None:
    """The parser that reads back the call which the template wrote, if one does."""
    for name in TOOL_CALL_PARSERS:
        parser = ReplyParser(ThinkParser(), PARSERS[name]([CALLED]))  # Qwen3's writes empty reasoning before a call
        found = parser.feed(template.call_written, finished=True)
        if found and isinstance(found[0], ToolCall):
            return name
    return None
