"""`/v1/chat/completions`: a completion's text as an assistant's message, with its reasoning and its tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.completion import Completion
from outrider.errors import FieldError, PromptError
from outrider.server.generation import Gain, Generation
from outrider.server.openai.completions import Form, answer, begin, head, placed
from outrider.server.openai.output_parsers import Part, Reasoning, ReplyParser
from outrider.server.openai.schemas import ChatRequest, Sampling, parse
from outrider.server.openai.tool_calls import ToolCall
from outrider.server.service import Prompts, Service
from outrider.server.tokenizer_service import Texts


async def chat(service: Service, request: Request) -> Response:
    """Answers `/v1/chat/completions`."""
    asked = parse(await request.body(), ChatRequest)
    tools = asked.shown_tools()

    async def prompts() -> Prompts:
        return [(None, await service.texts.conversation(asked.messages, asked.chat_template_kwargs, tools))]

    defaults = text_defaults(service.texts, asked, tools)
    try:
        generation = await begin(service, request, asked, prompts(), **defaults)
    except PromptError as error:
        raise placed(error, "messages") from None
    kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    replies = replies_of(service.texts, generation, tools, asked.parallel_tool_calls)
    form = _ChatForm(asked, head(service, request, "chatcmpl", kind), service.texts, replies)
    return await answer(service, request, generation, form)


def text_defaults(texts: Texts, asked: Sampling, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sampling parameters that keep every tag in the text. FieldError for tools that cannot be had."""
    if tools:
        texts.dialect.check_tools()
    hidden = texts.dialect.hides(with_tools=bool(tools))
    if hidden is None:
        return {}
    if asked.skip_special_tokens:
        said = f"skip_special_tokens true hides {hidden}, which is to be read: leave it out"
        raise FieldError(said, "skip_special_tokens")
    return {"skip_special_tokens": False}


def replies_of(
    texts: Texts, generation: Generation, tools: Sequence[dict[str, Any]], parallel: bool | None
) -> list[ReplyParser]:
    """What reads each completion of a generation."""
    names = [tool["function"]["name"] for tool in tools]
    most = 1 if parallel is False else None
    return [texts.dialect.reply(one.parent.prompt_token_ids, names, most) for one in generation.completions]


def call_id() -> str:
    """An id for a call, for the message that brings its result."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class _ChatForm(Form):
    texts: Texts
    replies: list[ReplyParser]

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Each message's role."""
        role = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            for index in range(len(generation.completions))
        ]

    def bodies(self, gain: Gain) -> list[dict[str, Any]]:
        """What a message gained: each piece of reasoning or content, and each call, its name first."""
        reply = self.replies[gain.index]
        number = reply.num_calls
        bodies: list[dict[str, Any]] = []
        for part in reply.feed(gain.text, finished=gain.finish_reason is not None):
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
        """What a chunk tells of some content."""
        return {"delta": {"content": text} if text else {}}

    def reason(self, index: int, finish_reason: str | None) -> str | None:
        """A message that calls tools has not stopped: it waits for them."""
        return "tool_calls" if finish_reason == "stop" and self.replies[index].num_calls else finish_reason

    def choice(self, completion: Completion, echoed: str) -> dict[str, Any]:
        """A message with all its text."""
        parts = self.replies[completion.output.index].feed(completion.output.text, finished=True)
        return {"message": _message(parts)}

    def usage(self, generation: Generation) -> dict[str, Any]:
        """As for any, with the tokens of reasoning where that is told apart."""
        usage = Form.usage(self, generation)
        if self.texts.dialect.reasons:
            count = num_reasoned(self.texts, generation, self.replies)
            usage["completion_tokens_details"] = {"reasoning_tokens": count}
        return usage


def num_reasoned(texts: Texts, generation: Generation, replies: Sequence[ReplyParser]) -> int:
    """Tokens of reasoning in all completions of a generation that has ended."""
    return sum(
        texts.dialect.num_reasoning_tokens(completion.output.token_ids)
        for completion, reply in zip(generation.completions, replies, strict=True)
        if reply.has_reasoning
    )


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
