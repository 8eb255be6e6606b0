"""`/v1/responses`: a completion's text as the items of OpenAI's Responses API, whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.generation import AsyncGeneration
from outrider.errors import PromptError
from outrider.server.http.responses import describe, event
from outrider.server.openai.base import begin, ended, usage
from outrider.server.openai.output_parsers import Part, Reasoning, ReplyParser
from outrider.server.openai.record import parse
from outrider.server.openai.replies import call_id, num_reasoning_tokens, reply_parsers, text_defaults
from outrider.server.openai.responses_schemas import ResponsesRequest
from outrider.server.openai.tool_calls import ToolCall
from outrider.server.service import Prompts, Service

Event = dict[str, Any]


async def respond(service: Service, request: Request) -> Response:
    """Answers `/v1/responses`."""

    def read(body: bytes) -> tuple[ResponsesRequest, Any, list[dict[str, Any]], dict[str, Any]]:
        asked = parse(body, ResponsesRequest)
        return asked, asked.messages(), asked.shown_tools(), asked.rendering()

    asked, (messages, fields), tools, rendering = await service.read(request, read)
    limits = {"limit": service.facts.max_model_len, "num_bytes": len(await request.body())}

    async def prompts() -> Prompts:
        return [(None, await service.tokenizer.conversation(messages, **rendering, **limits))]

    defaults = text_defaults(service.tokenizer, asked, tools)
    try:
        generation = await begin(service, request, asked, prompts(), **defaults)
    except PromptError as error:
        raise PromptError(str(error), _request_field(error.field, fields)) from None
    (reply,) = reply_parsers(service.tokenizer, generation, tools, asked.parallel_tool_calls)
    record = {"id": f"resp_{request.state.request_id}", **_record(service, asked, generation)}
    answer = _Answer(record, service, generation, reply)
    events = _streamed(answer, generation) if asked.stream else None
    return await ended(service, request, generation, events, answer.whole, answer.failed)


def _request_field(field: str | None, fields: Sequence[str]) -> str:
    """The field of the request that a field of its messages comes from."""
    whole, _, rest = (field or "messages").partition(".")
    if whole != "messages":
        return field or "input"
    number, _, name = rest.partition(".")
    return f"{fields[int(number)]}{'.call_id' if name == 'tool_call_id' else ''}" if number else "input"


def _record(service: Service, asked: ResponsesRequest, generation: AsyncGeneration) -> dict[str, Any]:
    """What a response says of its request, and begins with."""
    sampling = generation.params
    tools = [{"type": "function", **tool.model_dump(exclude={"type"}), "strict": False} for tool in asked.tools or ()]
    return {
        "object": "response",
        "created_at": int(time.time()),
        "model": service.model_name,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": tools,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
        "prompt_cache_key": asked.prompt_cache_key,
        "safety_identifier": asked.safety_identifier,
        "metadata": {},
        **asked.given_back(),
    }


class _Answer:
    """A response as it grows. Its events make its items, so both agree."""

    def __init__(
        self, record: dict[str, Any], service: Service, generation: AsyncGeneration, reply: ReplyParser
    ) -> None:
        self._record, self._service, self._generation, self._reply = record, service, generation, reply
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last item, while text may be added to it
        self._num_sent = 0  # events

    def begun(self) -> Iterator[Event]:
        """What a stream begins with."""
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._record}

    def gained(self, text: str, finished: bool) -> Iterator[Event]:
        """What some text adds."""
        for part in self._reply.feed(text, finished):
            yield from self._add(part)

    def ended(self) -> Iterator[Event]:
        """What a stream ends with, once the generation has."""
        is_cut = self._generation.completions[0].output.finish_reason == "length"
        if not self._items:
            yield from self._opened("message")
        yield from self._closed("incomplete" if is_cut else "completed")
        ending: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        if is_cut:
            ending = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        response = {**self._record, **ending, "output": self._items, "usage": self._usage()}
        yield {"type": f"response.{response['status']}", "response": response}

    def failed(self, error: Exception) -> bytes:
        """What a stream ends with if it ends badly."""
        record = {"code": "server_error", "message": describe(error)[1]["error"]["message"]}
        response = {**self._record, "status": "failed", "error": record, "output": self._items}
        return self.encode([{"type": "response.failed", "response": response}])

    def encode(self, events: Iterable[Event]) -> bytes:
        """Events as they are sent, each with its name and number."""
        lines = []
        for one in events:
            numbered = {**one, "sequence_number": self._num_sent}
            lines.append(f"event: {one['type']}\n".encode() + event(numbered))
            self._num_sent += 1
        return b"".join(lines)

    def whole(self) -> dict[str, Any]:
        """The response of a generation that has ended."""
        *_, last = [*self.gained(self._generation.completions[0].output.text, True), *self.ended()]
        response: dict[str, Any] = last["response"]
        return response

    def _usage(self) -> dict[str, Any]:
        counts = usage(self._generation)
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        reasoned = num_reasoning_tokens(self._service.tokenizer, self._generation, [self._reply])
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": reasoned},
            "total_tokens": counts["total_tokens"],
            "speculative": counts["speculative"],
        }

    def _add(self, part: Part) -> Iterator[Event]:
        if isinstance(part, ToolCall):
            yield from self._closed("completed")
            yield from self._called(part)
            return
        kind, text = ("reasoning", part.text) if isinstance(part, Reasoning) else ("message", part)
        if self._open is None or self._open["type"] != kind:
            yield from self._closed("completed")
            yield from self._opened(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        yield self._of_text("delta", delta=text)

    def _opened(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            item: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        item["status"] = "in_progress"
        self._open = {**item, "content": [part]}
        self._items.append(self._open)
        yield self._of_item("output_item.added", item={**item, "content": []})
        yield self._of_part("content_part.added", part=dict(part))

    def _closed(self, status: str) -> Iterator[Event]:
        """The events after which nothing is added to the open item, if there is one."""
        if self._open is None:
            return
        self._open["status"] = status
        part = self._open["content"][0]
        yield self._of_text("done", text=part["text"])
        yield self._of_part("content_part.done", part=part)
        yield self._of_item("output_item.done", item=self._open)
        self._open = None

    def _called(self, call: ToolCall) -> Iterator[Event]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call_id(), "name": call.name}
        done = {**item, "arguments": call.arguments, "status": "completed"}
        self._items.append(done)
        item_id = {"item_id": item["id"]}
        yield self._of_item("output_item.added", item={**item, "arguments": "", "status": "in_progress"})
        yield self._of_item("function_call_arguments.delta", **item_id, delta=call.arguments)
        yield self._of_item("function_call_arguments.done", **item_id, name=call.name, arguments=call.arguments)
        yield self._of_item("output_item.done", item=done)

    def _of_item(self, kind: str, **more: Any) -> Event:
        """An event about the last item."""
        return {"type": f"response.{kind}", "output_index": len(self._items) - 1, **more}

    def _of_part(self, kind: str, **more: Any) -> Event:
        """An event about the one part of the open item."""
        assert self._open is not None
        return self._of_item(kind, item_id=self._open["id"], content_index=0, **more)

    def _of_text(self, kind: str, **more: Any) -> Event:
        """An event about the text of the open item."""
        assert self._open is not None
        name = self._open["content"][0]["type"]
        logprobs: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
        return self._of_part(f"{name}.{kind}", **more, **logprobs)


async def _streamed(answer: _Answer, generation: AsyncGeneration) -> AsyncGenerator[bytes, None]:
    yield answer.encode(answer.begun())
    async for delta in generation.deltas():
        if lines := answer.encode(answer.gained(delta.text, delta.finish_reason is not None)):
            yield lines
    yield answer.encode(answer.ended())
