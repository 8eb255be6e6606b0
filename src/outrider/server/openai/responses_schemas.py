"""The fields of `/v1/responses`, and its input as the conversation that it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from outrider.core.reading import written_short
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import NONE_OR_EMPTY
from outrider.engine.conversation import HINTS, check_fields, content_of
from outrider.errors import FieldError, PromptError
from outrider.load.chat_template import PARTS, in_form, text_of
from outrider.server.openai.hints import Effort, Summary, hint
from outrider.server.openai.record import FIRST_FAULT, NOTHING, Record
from outrider.server.openai.schemas import Sampling, called
from outrider.server.openai.tools import AFunction, FunctionTool, ToolChoice, shown_tools

_TEXT_FORMATS: tuple[dict[str, Any], ...] = ({}, {"format": None}, {"format": {"type": "text"}})
_VERBOSITIES: tuple[dict[str, Any], ...] = ({}, {"verbosity": None}, {"verbosity": "medium"})

_PARTS = ("input_text", "output_text", "text", "refusal")
_INSIDE = {
    "message": ("type", "role", "content"),
    "function_call": ("type", "call_id", "name", "arguments"),
    "function_call_output": ("type", "call_id", "output"),
    "reasoning": ("type", "content"),
}
_HINTS: Mapping[str, tuple[type, ...]] = {
    **HINTS,
    "status": (str,),
    "phase": (str,),
    "caller": (dict,),
    "summary": (list,),
    "encrypted_content": (str,),
}
"""What items of an earlier response hold and a conversation does not need."""

_LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ReasoningOptions(Record):
    """How much a model is to reason, and what of it the answer shows."""

    effort: Effort | None = hint("a chat template that reads reasoning_effort is given it")
    summary: Summary | None = hint("reasoning is given as it is")
    generate_summary: Summary | None = hint("reasoning is given as it is")
    context: Literal["auto", "current_turn", "all_turns"] | None = hint("the chat template decides it")


class ResponsesStreamOptions(Record):
    """What a stream of events brings beside the text."""

    include_obfuscation: bool | None = hint("no padding is added, as a proxy that hides lengths can do")


class ResponsesRequest(Sampling):
    """The body of `/v1/responses`. Nothing is stored: each request brings its whole conversation."""

    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": NONE_OR_EMPTY,
        "background": (None, False),
        "background_options": NONE_OR_EMPTY,
        "context_management": (None, []),
        "conversation": NOTHING,
        "image": NONE_OR_EMPTY,
        "max_tool_calls": NOTHING,
        "moderation": NOTHING,
        "previous_response_id": NOTHING,
        "prompt": NOTHING,
        "store": (None, False),
        "text": (None, *({**form, **length} for form in _TEXT_FORMATS for length in _VERBOSITIES)),
        "top_logprobs": (None, 0),
        "truncation": (None, "disabled"),
    }

    input: Annotated[
        Any,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
        Field(description="text, or a list of messages and items of earlier answers"),
    ]
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1, description="most tokens of the answer")
    tools: Annotated[list[Annotated[FunctionTool, AFunction]], FIRST_FAULT] | None = Field(
        None, description="functions that the model may call"
    )
    tool_choice: ToolChoice = Field(None, description="none: the model is shown no tools")
    parallel_tool_calls: bool | None = Field(None, description="false: what follows the first call is left out")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="arguments that the chat template reads")
    include: list[Includable] | None = hint("an answer holds all that there is")
    reasoning: ReasoningOptions | None = None
    stream_options: ResponsesStreamOptions | None = None

    def sampling(self, **defaults: Any) -> SamplingParams:
        """As for any; an answer may be as long as there is room for unless `max_output_tokens` says less."""
        with called("max_tokens", "max_output_tokens"):
            return super().sampling(**{"max_tokens": self.max_output_tokens, **defaults})

    def check(self) -> None:
        """What no field shows by itself."""
        super().check()
        if _LOGPROBS in (self.include or ()):
            raise FieldError(f"include {_LOGPROBS} is not offered: leave it out", "include")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options is for streams: leave it out, or set stream", "stream_options")
        if self.returns_tokens:
            where = "speculative.return_tokens"
            raise FieldError(f"{where} is for completions and chat completions: leave it out", where)

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, as its chat template takes them."""
        return shown_tools(self.tools or (), self.tool_choice, "tools.{}.")

    def rendering(self) -> dict[str, Any]:
        """How the conversation is written, as `encode_conversation` takes it."""
        effort = None if self.reasoning is None else self.reasoning.effort
        wishes = {"reasoning_effort": effort}
        return {"tools": self.shown_tools(), "arguments": self.chat_template_kwargs, "wishes": wishes}

    def messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The conversation, and the field that each message comes from. PromptError for items that fit into none."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        fields = ["instructions"] * len(messages)
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}], [*fields, "input"]
        if not isinstance(self.input, list) or not self.input:
            raise PromptError("input must be text, or a list of items that is not empty", "input")
        for index, item in enumerate(self.input):
            where = f"input.{index}"
            _add(messages, item, where)
            fields += [where] * (len(messages) - len(fields))
        return [{"content": "", **message} for message in messages], fields


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Adds an item: reasoning, text and calls of one answer are items of their own here, and one message there."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str) or kind not in _INSIDE:
        shown = written_short(kind if isinstance(item, dict) else item)
        raise PromptError(f"an item of input must be of type {', '.join(_INSIDE)}: {shown}", where)
    check_fields(item, _INSIDE[kind], where, f"an item of type {kind}", _HINTS)
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
