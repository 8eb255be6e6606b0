"""The fields of requests: what is taken, what is not offered and may only be given as if it were left out.

An unknown field, one of the wrong type and one that asks for what the engine lacks are each refused with its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import (
    MIN_P,
    MIN_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SamplingField,
)
from outrider.engine.conversation import ROLES
from outrider.errors import FieldError, SamplingError
from outrider.server.openai.hints import Effort, ServiceTier, hint
from outrider.server.openai.record import FIRST_FAULT, Record
from outrider.server.openai.tools import AFunction, Tool, ToolChoice, shown_tools

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

    include_usage: bool | None = Field(None, description="a last chunk with the usage of the whole request")
    continuous_usage_stats: bool | None = Field(None, description="in every chunk, the usage so far")
    include_obfuscation: bool | None = hint("no padding is added, as a proxy that hides lengths can do")


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


class PromptCacheOptions(Record):
    """How OpenAI is to cache a prompt."""

    mode: Literal["implicit", "explicit"] | None = hint("equal beginnings of prompts share a cache without it")
    ttl: str | None = hint("the cache keeps what it has room for")


class Sampling(Record):
    """What all kinds of completion take; null is as if left out."""

    model: str | None = Field(None, description="the served model's name; left out: the one there is")
    temperature: float | None = _field(TEMPERATURE)
    top_p: float | None = _field(TOP_P)
    top_k: int | None = _field(TOP_K)
    min_p: float | None = _field(MIN_P)
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[int], FIRST_FAULT] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = Field(None, description="whether the text comes in events, as it is made")
    speculative: Speculative | None = None
    vllm_xargs: dict[str, Any] | None = Field(None, description="parameters of the server's own logits processors")
    user: str | None = hint()
    safety_identifier: str | None = hint()
    prompt_cache_key: str | None = hint("equal beginnings of prompts share a cache without it")
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = hint(
        "the cache keeps what it has room for"
    )
    prompt_cache_options: PromptCacheOptions | None = None
    client_metadata: dict[str, Any] | None = hint()
    metadata: dict[str, str] | None = hint("it is given back as it came, and kept nowhere")
    service_tier: ServiceTier | None = hint("every request is served alike")

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
        check_metadata(self.metadata)

    def given_back(self) -> dict[str, Any]:
        """What a response repeats of its request, as OpenAI's does."""
        tier = {} if self.service_tier is None else {"service_tier": "default"}  # there is one
        return tier if self.metadata is None else {**tier, "metadata": self.metadata}


class Sampled(Sampling):
    """What both kinds of completion with choices take."""

    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = _field(MIN_TOKENS)
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(None, description="token ids beside the text")

    def check(self) -> None:
        """What no field shows by itself."""
        super().check()
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options is for streams: leave it out, or set stream", "stream_options")
        if self.returns_tokens and not self.stream:
            where = "speculative.return_tokens"
            raise FieldError(f"{where} is for streams: leave it out, or set stream", where)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def counts_on(self) -> bool:
        """Whether every chunk of a stream brings the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats is True


class CompletionRequest(Sampled):
    """The body of `/v1/completions`."""

    prompt: Prompts
    echo: bool | None = Field(None, description="the prompt's text before the completion's")


@contextmanager
def called(name: str, here: str) -> Iterator[None]:
    """Around what reads a sampling parameter that a request calls otherwise: a refusal of it has the request's name."""
    try:
        yield
    except SamplingError as error:
        if error.field != name:
            raise
        raise SamplingError(str(error).replace(name, here, 1), here) from None


class ChatRequest(Sampled):
    """The body of `/v1/chat/completions`."""

    messages: Conversation = Field(description="the conversation so far, oldest first")
    tools: Annotated[list[Annotated[Tool, AFunction]], FIRST_FAULT] | None = Field(
        None, description="functions that the model may call"
    )
    tool_choice: ToolChoice = Field(None, description="none: the model is shown no tools")
    parallel_tool_calls: bool | None = Field(None, description="false: what follows the first call is left out")
    max_completion_tokens: int | None = Field(None, ge=1, description="most tokens of the answer, as max_tokens")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="arguments that the chat template reads")
    add_generation_prompt: bool | None = Field(None, description="false: the template begins no reply")
    continue_final_message: bool | None = Field(
        None, description="true: the text goes on where the last message ends; needs add_generation_prompt false"
    )
    reasoning_effort: Effort | None = hint("a chat template that reads reasoning_effort is given it")

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
        with called("max_tokens", "max_tokens" if longest is None else "max_completion_tokens"):
            return super().sampling(**{"max_tokens": None, **defaults})

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, as its chat template takes them."""
        return shown_tools([tool.function for tool in self.tools or ()], self.tool_choice, "tools.{}.function.")

    def rendering(self) -> dict[str, Any]:
        """How the conversation is written, as `encode_conversation` takes it."""
        return {
            "tools": self.shown_tools(),
            "arguments": self.chat_template_kwargs,
            "wishes": {"reasoning_effort": self.reasoning_effort},
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": self.continue_final_message is True,
        }


class TokenizeRequest(Record):
    """The body of `/tokenize`: a text, or a conversation under the model's chat template."""

    model: str | None = Field(None, description="the served model's name; left out: the one there is")
    prompt: str | None = Field(None, description="text to tokenize")
    messages: Conversation = Field(None, description="a conversation to tokenize, in place of a prompt")
    add_special_tokens: bool | None = Field(None, description="with a prompt; true if left out")
    return_token_strs: bool | None = Field(None, description="the text of each token beside its id")


class DetokenizeRequest(Record):
    """The body of `/detokenize`."""

    model: str | None = Field(None, description="the served model's name; left out: the one there is")
    tokens: Annotated[list[int], FIRST_FAULT] = Field(description="token ids to turn into text")


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """FieldError for more of it than OpenAI takes."""
    if metadata is not None and len(metadata) > 16:
        raise FieldError(f"metadata has at most 16 pairs: {len(metadata)}", "metadata")
    for name, value in (metadata or {}).items():
        if len(name) > 64 or len(value) > 512:
            raise FieldError("a key of metadata has at most 64 characters, a value 512", "metadata")
