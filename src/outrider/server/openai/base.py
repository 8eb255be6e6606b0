"""What the endpoints share: a generation begun, awaited or streamed, and choices as OpenAI writes them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.completion import Completion
from outrider.engine.generation import AsyncGeneration, CompletionDelta
from outrider.errors import PromptError, SamplingError
from outrider.server.http.responses import DONE, EventStream, event, json_response, unless_gone
from outrider.server.openai.schemas import Sampled, Sampling
from outrider.server.service import Prompts, Service


@dataclass(frozen=True, slots=True)
class ResponseBuilder(ABC):
    """How one kind of completion is written: as a whole, or as the chunks of a stream."""

    asked: Sampled
    head: dict[str, Any]  # what the response and all its chunks begin with

    @abstractmethod
    def opening(self, generation: AsyncGeneration) -> list[dict[str, Any]]:
        """Choices that a stream begins with."""

    @abstractmethod
    def body(self, text: str) -> dict[str, Any]:
        """What a chunk holds of some text."""

    @abstractmethod
    def content(self, completion: Completion) -> dict[str, Any]:
        """What a choice holds of a completion that has ended."""

    def bodies(self, delta: CompletionDelta) -> list[dict[str, Any]]:
        """What chunks hold of a delta. Its text is empty for part of a character or of a stop string."""
        return [self.body(delta.text)] if delta.text else []

    def finish_reason(self, index: int, reason: str | None) -> str | None:
        """Why a choice ended, of the reasons that OpenAI has."""
        return reason

    def usage(self, generation: AsyncGeneration) -> dict[str, Any]:
        """Tokens in and out."""
        return usage(generation)

    def chunks(self, delta: CompletionDelta, stop_reason: int | str | None = None) -> list[dict[str, Any]]:
        """Choices of a stream for a delta."""
        bodies = self.bodies(delta)
        if delta.finish_reason or self.asked.return_token_ids or self.asked.returns_tokens:
            bodies = bodies or [self.body("")]
        chunks = [{**choice(delta.index, body), "stop_reason": None} for body in bodies]
        if chunks:
            reason = self.finish_reason(delta.index, delta.finish_reason)
            chunks[-1] |= {"finish_reason": reason, "stop_reason": stop_reason}
        if self.asked.return_token_ids:
            for chunk in chunks:
                chunk["token_ids"] = []
            chunks[-1]["token_ids"] = delta.token_ids
        return chunks

    def whole(self, generation: AsyncGeneration) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        choices = []
        for completion in generation.completions:
            output, index = completion.output, completion.index
            made = choice(index, self.content(completion), self.finish_reason(index, output.finish_reason))
            made["stop_reason"] = output.stop_reason
            if self.asked.return_token_ids:
                made["token_ids"] = output.token_ids
                made["prompt_token_ids"] = completion.parent.prompt_token_ids
            choices.append(made)
        return {**self.head, "choices": choices, "usage": self.usage(generation), **self.asked.given_back()}


def choice(index: int, body: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """A choice, whole or of a chunk. Log probabilities are not offered."""
    return {"index": index, **body, "logprobs": None, "finish_reason": finish_reason}


def usage(generation: AsyncGeneration) -> dict[str, Any]:
    """OpenAI's record of tokens in and out, with one entry more: what drafts were worth."""
    counts = generation.usage()
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "speculative": counts.acceptance.to_dict(),
    }


async def begin(
    service: Service, request: Request, asked: Sampling, prompts: Coroutine[Any, Any, Prompts], **defaults: Any
) -> AsyncGeneration:
    """Queues what is asked, unless the client goes first; `defaults` of sampling parameters that it leaves out.

    Raises as `Service.begin`, and ClientGoneError.
    """
    try:
        asked.check()
        service.check_model(asked.model)
        params = asked.sampling(**service.facts.sampling_defaults, **defaults)
        begun = asyncio.ensure_future(service.begin(asked, prompts, params))
        try:
            return await unless_gone(request, begun)
        except BaseException:
            if begun.done() and not begun.cancelled() and begun.exception() is None:
                service.client.abort(begun.result())
            raise
    except SamplingError as error:
        field = error.field
        if field is not None and field.startswith("extra_args"):  # which requests call vllm_xargs
            raise SamplingError(str(error), f"vllm_xargs{field.removeprefix('extra_args')}") from None
        raise
    finally:
        prompts.close()


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Around what reads a prompt: a PromptError that names no field leaves it with this one."""
    try:
        yield
    except PromptError as error:
        raise error if error.field is not None else PromptError(str(error), field) from None


def head(service: Service, request: Request, prefix: str, kind: str) -> dict[str, Any]:
    """What a response and all its chunks begin with."""
    return {
        "id": f"{prefix}-{request.state.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
    }


async def answer(service: Service, request: Request, generation: AsyncGeneration, builder: ResponseBuilder) -> Response:
    """The response to a request, whole or streamed."""
    events = _events(generation, builder) if builder.asked.stream else None
    return await ended(service, request, generation, events, lambda: builder.whole(generation))


async def ended(
    service: Service,
    request: Request,
    generation: AsyncGeneration,
    events: AsyncGenerator[bytes, None] | None,
    whole: Callable[[], Any],
    failed: Callable[[Exception], bytes] | None = None,
) -> Response:
    """A stream of these events, or without any the whole of it as JSON, once it has come.

    The generation ends with its response. `failed`: as `EventStream` takes it.
    """

    def closed() -> None:
        service.client.abort(generation)

    if events is not None:
        return EventStream(events, closed, failed)
    try:
        await unless_gone(request, _drained(generation))
    finally:
        closed()
    return json_response(whole())


async def _drained(generation: AsyncGeneration) -> None:
    """Waits for its end. Raises what it failed with."""
    async for _ in generation.deltas():
        pass


async def _events(generation: AsyncGeneration, builder: ResponseBuilder) -> AsyncGenerator[bytes, None]:
    asked, num_sent = builder.asked, 0

    def counted() -> dict[str, Any]:
        if not asked.counts_on:
            return {"usage": None} if asked.includes_usage else {}
        counts = usage(generation)
        return {"usage": {**counts, "completion_tokens": num_sent, "total_tokens": counts["prompt_tokens"] + num_sent}}

    for opened in builder.opening(generation):
        yield event({**builder.head, "choices": [opened], **counted()})
    async for delta in generation.deltas():
        num_sent += len(delta.token_ids)
        stop_reason = generation.completions[delta.index].output.stop_reason if delta.finish_reason else None
        chunks = builder.chunks(delta, stop_reason)
        if asked.returns_tokens:
            chunks[-1]["speculative"] = _speculative(delta, generation)
        for chunk in chunks:
            yield event({**builder.head, "choices": [chunk], **counted()})
    if asked.includes_usage:
        yield event({**builder.head, "choices": [], "usage": builder.usage(generation)})
    yield DONE


def _speculative(delta: CompletionDelta, generation: AsyncGeneration) -> dict[str, Any]:
    """Where each token came from, when they came, and how the completion's drafts have fared so far."""
    tokens = [
        {
            "id": piece.token_id,
            "text": piece.text,
            "draft_position": piece.draft_position,
        }
        for piece in delta.pieces
    ]
    acceptance = generation.completions[delta.index].acceptance.report()
    return {"tokens": tokens, "seconds": generation.seconds(delta.index), "acceptance": acceptance.to_dict()}
