"""The fields of requests: what is taken, what is not offered and may only be given as if it were left out.

An unknown field, one of the wrong type and one that asks for what the engine lacks are each refused with its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from outrider.core.sampling import NOT_OFFERED as SAMPLING_NOT_OFFERED
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import (
    MIN_P,
    MIN_TOKENS,
    NONE_OR_EMPTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SamplingField,
)
from outrider.engine.conversation import ROLES
from outrider.errors import FieldError, nearest, shortened

MOST_NESTED = 64
"""Lists and objects of a body, each in the next."""

TOO_DEEP = f"the body is nested more than {MOST_NESTED} deep: flatten it"

NOTHING: tuple[Any, ...] = (None,)
_NEITHER = (None, False)

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    **SAMPLING_NOT_OFFERED,
    "add_special_tokens": (None,),
    "audio": NOTHING,
    "best_of": (None, 1),
    "cache_salt": NOTHING,
    "chat_template": NOTHING,
    "documents": NONE_OR_EMPTY,
    "function_call": (None, "none"),
    "functions": NONE_OR_EMPTY,
    "length_penalty": (None, 1),
    "metadata": NONE_OR_EMPTY,
    "modalities": (None, ["text"]),
    "prediction": NOTHING,
    "priority": (None, 0),
    "prompt_embeds": NOTHING,
    "reasoning_effort": NOTHING,
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": _NEITHER,
    "suffix": NONE_OR_EMPTY,
    "top_logprobs": (None, 0),
    "truncate_prompt_tokens": NOTHING,
    "use_beam_search": _NEITHER,
    "verbosity": NOTHING,
    "web_search_options": NOTHING,
}
"""Fields of OpenAI's and vLLM's that ask for what the engine lacks, and the values that ask for nothing."""

_ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_texts = {"type": "array", "items": {"type": "string"}}
Prompts = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, _texts, _ids, {"type": "array", "items": _ids}]}),
    Field(description="text, token ids, or a list of either"),
]
Conversation = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"enum": list(ROLES)},
                    "content": {
                        "anyOf": [
                            {"type": "string"},
                            {"type": "array", "items": {"type": "object"}},
                            {"type": "null"},
                        ]
                    },
                    "tool_calls": {"type": "array", "items": {"type": "object"}},
                    "tool_call_id": {"type": "string"},
                    "reasoning": {"type": "string"},
                    "reasoning_content": {"type": "string"},
                },
            },
        }
    ),
]
Stop = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _texts, {"type": "null"}]})]


class Record(BaseModel):
    """A request body, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_OFFERED


def _field(declared: SamplingField) -> Any:
    """A sampling parameter as a field of a body; left out, the engine's default is taken."""
    low = declared.low if declared.also_off is None else declared.also_off
    return Field(
        None,
        description=declared.help,
        gt=low if declared.above_low else None,
        ge=None if declared.above_low else low,
        le=declared.high if declared.high < math.inf else None,
    )


class StreamOptions(Record):
    """What a stream brings beside the text."""

    include_usage: bool = Field(False, description="a last chunk with the usage of the whole request")


class Speculative(Record):
    """How far drafts may run ahead for this request alone; the text is the same with any."""

    enabled: bool = Field(True, description="false: no draft of this request is verified")
    num_speculative_tokens: int | None = Field(None, ge=1, description="most drafts a step, up to the server's")
    return_tokens: bool = Field(False, description="in a stream, each token's id, text and draft position")

    def max_drafts(self, limit: int) -> int | None:
        """The engine's limit for it; FieldError for more than the server drafts."""
        if not self.enabled:
            if self.num_speculative_tokens is not None:
                raise FieldError(
                    "speculative.num_speculative_tokens contradicts speculative.enabled false: leave one out",
                    "speculative.num_speculative_tokens",
                )
            return 0
        wanted = self.num_speculative_tokens
        if wanted is not None and wanted > limit:
            raise FieldError(
                f"speculative.num_speculative_tokens {wanted} is more than the {limit} that this server drafts a round",
                "speculative.num_speculative_tokens",
            )
        return wanted


class Sampling(Record):
    """What all kinds of completion take; null is as if left out."""

    model: str | None = None
    temperature: float | None = _field(TEMPERATURE)
    top_p: float | None = _field(TOP_P)
    top_k: int | None = _field(TOP_K)
    min_p: float | None = _field(MIN_P)
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    speculative: Speculative | None = None
    vllm_xargs: dict[str, Any] | None = Field(None, description="parameters of the server's own logits processors")
    user: str | None = Field(None, description="who asks; kept nowhere")

    def sampling(self, **defaults: Any) -> SamplingParams:
        """The engine's sampling parameters. SamplingError names what is wrong."""
        names = SamplingParams.__dataclass_fields__
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        given |= {} if self.vllm_xargs is None else {"extra_args": self.vllm_xargs}
        return SamplingParams(**{**defaults, **given})

    @property
    def returns_tokens(self) -> bool:
        """Whether a stream holds each token's origin."""
        return self.speculative is not None and self.speculative.return_tokens

    def check(self) -> None:
        """What no field shows by itself."""


class Sampled(Sampling):
    """What both kinds of completion with choices take."""

    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = _field(MIN_TOKENS)
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(None, description="token ids beside the text")

    def check(self) -> None:
        """What no field shows by itself."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options is for streams: leave it out, or set stream", "stream_options")
        if self.returns_tokens and not self.stream:
            where = "speculative.return_tokens"
            raise FieldError(f"{where} is for streams: leave it out, or set stream", where)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampled):
    """The body of `/v1/completions`."""

    prompt: Prompts
    echo: bool | None = Field(None, description="the prompt's text before the completion's")


class Function(Record):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="true is not offered: nothing holds the model to the schema")


def _only_functions(given: Any) -> Any:
    """Tools of other types have other fields: it is the type that is wrong with them."""
    if isinstance(given, dict) and given.get("type") != "function":
        raise PydanticCustomError("tool_type", "must be a tool of type function, no other is offered")
    return given


AFunction = BeforeValidator(_only_functions)
"""For the annotation of a tool."""


class Tool(Record):
    """A function, as chat completions take it."""

    type: Literal["function"]
    function: Function


ToolChoice = Annotated[Any, WithJsonSchema({"enum": ["none", "auto", None]})]


def shown_tools(functions: Sequence[Function], choice: Any, where: str) -> list[dict[str, Any]]:
    """Tools as a chat template takes them; none if the choice is to call none. FieldError for what cannot be promised.

    `where`: the path of a function in the request, with its number as `{}`.
    """
    if choice not in (None, "none", "auto"):
        said = "is not offered, as nothing makes the model call a tool: leave it out, or ask for auto or none"
        raise FieldError(f"tool_choice {shortened(repr(choice))} {said}", "tool_choice")
    names: set[str] = set()
    for index, function in enumerate(functions):
        if function.strict:
            said = (
                "strict is not offered, as nothing holds the model to a schema: leave it out, and check the arguments"
            )
            raise FieldError(said, f"{where.format(index)}strict")
        if function.name in names:
            raise FieldError(f"two tools have the name {function.name}: name them apart", f"{where.format(index)}name")
        names.add(function.name)
    if choice == "none":
        return []
    return [
        {
            "type": "function",
            "function": function.model_dump(include={"name", "description", "parameters"}, exclude_none=True),
        }
        for function in functions
    ]


class ChatRequest(Sampled):
    """The body of `/v1/chat/completions`."""

    messages: Conversation
    tools: list[Annotated[Tool, AFunction]] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(None, description="false: what follows the first call is left out")
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="arguments that the chat template reads")
    add_generation_prompt: bool | None = Field(None, description="false: the template begins no reply")
    continue_final_message: bool | None = Field(
        None, description="true: the text goes on where the last message ends; needs add_generation_prompt false"
    )

    def sampling(self, **defaults: Any) -> SamplingParams:
        """As for any; an answer may be as long as there is room for unless `max_completion_tokens` says less."""
        longest = self.max_completion_tokens
        if longest is not None:
            if self.max_tokens not in (None, longest):
                raise FieldError(
                    f"max_completion_tokens {longest} contradicts max_tokens {self.max_tokens}: give one",
                    "max_completion_tokens",
                )
            defaults["max_tokens"] = longest
        return super().sampling(**{"max_tokens": None, **defaults})

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, as its chat template takes them."""
        return shown_tools([tool.function for tool in self.tools or ()], self.tool_choice, "tools.{}.function.")

    def rendering(self) -> dict[str, Any]:
        """How the conversation is written, as `encode_conversation` takes it."""
        return {
            "tools": self.shown_tools(),
            "arguments": self.chat_template_kwargs,
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": self.continue_final_message is True,
        }


class TokenizeRequest(Record):
    """The body of `/tokenize`: a text, or a conversation under the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Conversation = None
    add_special_tokens: bool | None = Field(None, description="with a prompt; true if left out")
    return_token_strs: bool | None = None


class DetokenizeRequest(Record):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[int]


Asked = TypeVar("Asked", bound=Record)


def parse(body: bytes, record: type[Asked]) -> Asked:
    """A request body as its record. FieldError for the first thing that is wrong with it."""
    try:
        given = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise FieldError(f"the body is not JSON: no UTF-8 from byte {error.start} on, send it as UTF-8") from None
    except RecursionError:
        raise FieldError(TOO_DEEP) from None
    except msgspec.DecodeError as error:
        raise FieldError(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise FieldError("the body must be a JSON object")
    _check_depth(given)
    known = record.model_fields
    for name in list(given):
        if name in known:
            continue
        if name not in record.not_offered:
            raise FieldError(f"unknown field: {shortened(name)} ({nearest(name, known)})", shortened(name))
        if not _asks_for_nothing(given.pop(name), record.not_offered[name]):
            raise FieldError(f"{name} is not offered: leave it out", name)
    try:
        return record.model_validate(given)
    except ValidationError as error:
        raise _told(error) from None


def _check_depth(given: Any) -> None:
    """Raises FieldError for what is nested so deeply that encoding it could fail."""
    level = [given]
    for _ in range(MOST_NESTED):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise FieldError(TOO_DEEP)


def _asks_for_nothing(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them; 1 is not True here, but 0.0 is 0."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _told(error: ValidationError) -> FieldError:
    """The first of pydantic's complaints, in our words."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return FieldError(f"{name} is missing", name)
    if first["type"] == "extra_forbidden":
        return FieldError(f"unknown field: {shortened(name)}", shortened(name))
    said = "must be a whole number" if first["type"].startswith("int_") else first["msg"]
    said = said.replace("Input should be", "must be")
    return FieldError(f"{name} {said}: {shortened(repr(first['input']))}", name)
