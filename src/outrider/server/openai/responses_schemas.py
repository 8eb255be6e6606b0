"""The fields of `/v1/responses`, and its input as the conversation that it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import NONE_OR_EMPTY
from outrider.engine.conversation import content_of
from outrider.errors import FieldError, PromptError, shortened
from outrider.load.chat_template import PARTS, in_form, text_of
from outrider.server.openai.schemas import (
    NOTHING,
    AFunction,
    Function,
    Sampling,
    ToolChoice,
    shown_tools,
)

_NO_REASONING: tuple[Any, ...] = (None, {}, {"effort": None}, {"summary": None}, {"effort": None, "summary": None})
_PLAIN = {"type": "text"}

_PARTS = ("input_text", "output_text", "text")
_INSIDE = {
    "message": ("type", "role", "content"),
    "function_call": ("type", "call_id", "name", "arguments"),
    "function_call_output": ("type", "call_id", "output"),
    "reasoning": ("type", "content"),
}
_UNREAD = ("id", "status")
"""What items of an earlier response hold and a conversation does not need."""


class FunctionTool(Function):
    """A function, as responses take it. Tools of OpenAI's own are not offered."""

    type: Literal["function"]


class ResponsesRequest(Sampling):
    """The body of `/v1/responses`. Nothing is stored: each request brings its whole conversation."""

    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (None, False),
        "context_management": (None, []),
        "conversation": NOTHING,
        "include": (None, []),
        "max_tool_calls": NOTHING,
        "moderation": NOTHING,
        "previous_response_id": NOTHING,
        "prompt": NOTHING,
        "prompt_cache_options": (None, {}),
        "prompt_cache_retention": (None, "in_memory"),
        "reasoning": _NO_REASONING,
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "stream_options": (None, {}, {"include_obfuscation": False}),
        "text": (None, {}, {"format": None}, {"format": _PLAIN}, {"format": _PLAIN, "verbosity": None}),
        "top_logprobs": (None, 0),
        "truncation": (None, "disabled"),
    }

    input: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})
    ]
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[Annotated[FunctionTool, AFunction]] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(None, description="false: what follows the first call is left out")
    metadata: dict[str, str] | None = Field(None, description="given back as it came; kept nowhere")
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: str | None = Field(None, description="not needed: equal beginnings of prompts share a cache")
    safety_identifier: str | None = Field(None, description="who asks; kept nowhere")

    def sampling(self, **defaults: Any) -> SamplingParams:
        """As for any; an answer may be as long as there is room for unless `max_output_tokens` says less."""
        return super().sampling(**{"max_tokens": self.max_output_tokens, **defaults})

    def check(self) -> None:
        """What no field shows by itself."""
        if self.returns_tokens:
            where = "speculative.return_tokens"
            raise FieldError(f"{where} is for completions and chat completions: leave it out", where)

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, as its chat template takes them."""
        return shown_tools(self.tools or (), self.tool_choice, "tools.{}.")

    def messages(self) -> list[dict[str, Any]]:
        """The conversation. PromptError for items that fit into none."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not isinstance(self.input, list) or not self.input:
            raise PromptError("input must be text, or a list of items that is not empty", "input")
        for index, item in enumerate(self.input):
            _add(messages, item, f"input.{index}")
        return [{"content": "", **message} for message in messages]


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Adds an item: reasoning, text and calls of one answer are items of their own here, and one message there."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str) or kind not in _INSIDE:
        shown = shortened(repr(kind if isinstance(item, dict) else item))
        raise PromptError(f"an item of input must be of type {', '.join(_INSIDE)}: {shown}", where)
    for name, value in item.items():
        if name not in _INSIDE[kind] and name not in _UNREAD and value not in NONE_OR_EMPTY:
            raise PromptError(f"{shortened(name)} of an item of type {kind} is not offered: leave it out", where)
    if kind == "function_call_output":
        content = _content(item.get("output"), f"{where}.output", _PARTS)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _answer(messages).setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        if item.get("content") is not None:
            reasoning = text_of(content_of(item["content"], f"{where}.content", ("reasoning_text",)))
            _answer(messages, before=("reasoning", "content", "tool_calls"))["reasoning"] = reasoning
    else:
        content = _content(item.get("content"), f"{where}.content", _PARTS)
        if item.get("role") == "assistant":
            _answer(messages, before=("content", "tool_calls"))["content"] = content
        else:
            messages.append({"role": item.get("role"), "content": content})


def _content(content: Any, where: str, kinds: Sequence[str]) -> Any:
    """Content as chat completions have it: text, or a list of parts of text."""
    found = content_of(content, where, kinds)
    return found if isinstance(found, str) else in_form(found, PARTS)


def _answer(messages: list[dict[str, Any]], before: tuple[str, ...] = ()) -> dict[str, Any]:
    """The assistant's message that an item belongs to: the last one, unless it has what comes after such an item."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(name in last for name in before):
        messages.append({"role": "assistant"})
    return messages[-1]


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """As it came, within OpenAI's limits. FieldError beyond them."""
    if metadata is not None and len(metadata) > 16:
        raise FieldError(f"metadata has at most 16 pairs: {len(metadata)}", "metadata")
    for name, value in (metadata or {}).items():
        if len(name) > 64 or len(value) > 512:
            raise FieldError("a key of metadata has at most 64 characters, a value 512", "metadata")
    return dict(metadata or {})
