"""`/v1/chat/completions`: a completion's text as an assistant's message, with its reasoning and its tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.completion import Completion
from outrider.engine.generation import AsyncGeneration, CompletionDelta
from outrider.server.openai.base import ResponseBuilder, answer, begin, choice, head, naming, usage
from outrider.server.openai.output_parsers import Part, Reasoning, ReplyParser
from outrider.server.openai.record import parse
from outrider.server.openai.replies import call_id, num_reasoning_tokens, reply_parsers, text_defaults
from outrider.server.openai.schemas import ChatRequest
from outrider.server.openai.tool_calls import ToolCall
from outrider.server.service import Prompts, Service
from outrider.server.tokenizer_service import TokenizerService


async def chat(service: Service, request: Request) -> Response:
    """Answers `/v1/chat/completions`."""

    def read(body: bytes) -> tuple[ChatRequest, list[dict[str, Any]], dict[str, Any]]:
        asked = parse(body, ChatRequest)
        return asked, asked.shown_tools(), asked.rendering()

    asked, tools, rendering = await service.read(request, read)
    limits = {"limit": service.facts.max_model_len, "num_bytes": len(await request.body())}

    async def prompts() -> Prompts:
        return [(None, await service.tokenizer.conversation(asked.messages, **rendering, **limits))]

    defaults = text_defaults(service.tokenizer, asked, tools)
    with naming("messages"):
        generation = await begin(service, request, asked, prompts(), **defaults)
    kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    replies = reply_parsers(service.tokenizer, generation, tools, asked.parallel_tool_calls)
    builder = _MessageBuilder(asked, head(service, request, "chatcmpl", kind), service.tokenizer, replies)
    return await answer(service, request, generation, builder)


@dataclass(frozen=True, slots=True)
class _MessageBuilder(ResponseBuilder):
    """Choices of messages, with their reasoning and their tool calls."""

    tokenizer: TokenizerService
    replies: list[ReplyParser]

    def opening(self, generation: AsyncGeneration) -> list[dict[str, Any]]:
        """Each message's role."""
        role = {"role": "assistant", "content": ""}
        return [choice(completion.index, {"delta": role}) for completion in generation.completions]

    def bodies(self, delta: CompletionDelta) -> list[dict[str, Any]]:
        """Each piece of reasoning or content, and each call, its name first."""
        reply = self.replies[delta.index]
        number = reply.num_calls
        bodies: list[dict[str, Any]] = []
        for part in reply.feed(delta.text, finished=delta.finish_reason is not None):
            if isinstance(part, ToolCall):
                call = {"index": number, **_call_record(ToolCall(part.name, ""))}
                bodies.append({"delta": {"tool_calls": [call]}})
                rest = {"index": number, "function": {"arguments": part.arguments}}
                bodies.append({"delta": {"tool_calls": [rest]}})
                number += 1
            elif isinstance(part, Reasoning):
                bodies.append({"delta": _reasoning(part.text)})
            else:
                bodies.append(self.body(part))
        return bodies

    def body(self, text: str) -> dict[str, Any]:
        """Some content."""
        return {"delta": {"content": text} if text else {}}

    def finish_reason(self, index: int, reason: str | None) -> str | None:
        """A message that calls tools has not stopped: it waits for them."""
        return "tool_calls" if reason == "stop" and self.replies[index].num_calls else reason

    def content(self, completion: Completion) -> dict[str, Any]:
        """A message with all its text."""
        parts = self.replies[completion.index].feed(completion.output.text, finished=True)
        return {"message": _message(parts)}

    def usage(self, generation: AsyncGeneration) -> dict[str, Any]:
        """As for any, with the tokens of reasoning where that is separated."""
        counts = usage(generation)
        if self.tokenizer.output_parsers.reasons:
            count = num_reasoning_tokens(self.tokenizer, generation, self.replies)
            counts["completion_tokens_details"] = {"reasoning_tokens": count}
        return counts


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    content = "".join(part for part in parts if isinstance(part, str))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [_call_record(part) for part in parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if not content and (reasoning or calls):
        message["content"] = None
    if reasoning:
        message |= _reasoning(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients look for: vLLM's of today, and the one it had from DeepSeek."""
    return {"reasoning": text, "reasoning_content": text}


def _call_record(call: ToolCall) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
