"""`/v1/completions`, and what it shares with its siblings: a generation begun, awaited or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.completion import Completion
from outrider.errors import InputError, PromptError
from outrider.server.generation import Gain, Generation
from outrider.server.http.responses import DONE, EventStream, event, json_response, unless_gone
from outrider.server.openai.schemas import CompletionRequest, Sampled, Sampling, parse
from outrider.server.service import Prompts, Service


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind of completion is written."""

    asked: Sampled
    head: dict[str, Any]

    def echoed(self, generation: Generation) -> list[str]:
        """The text before each choice's own."""
        echoes = isinstance(self.asked, CompletionRequest) and self.asked.echo
        return [completion.parent.prompt or "" if echoes else "" for completion in generation.completions]

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Choices that a stream begins with."""
        echoed = enumerate(self.echoed(generation))
        return [chunk for index, text in echoed if text for chunk in self.chunks(Gain(index, text))]

    def chunks(self, gain: Gain, stop_reason: int | str | None = None) -> list[dict[str, Any]]:
        """Choices of a stream that tell of a gain."""
        bodies = self.bodies(gain)
        if gain.finish_reason or self.asked.return_token_ids or self.asked.returns_tokens:
            bodies = bodies or [self.body("")]
        chunks = [
            {"index": gain.index, **body, "logprobs": None, "finish_reason": None, "stop_reason": None}
            for body in bodies
        ]
        if chunks:
            chunks[-1] |= {"finish_reason": self.reason(gain.index, gain.finish_reason), "stop_reason": stop_reason}
        if self.asked.return_token_ids:
            for chunk in chunks:
                chunk["token_ids"] = []
            chunks[-1]["token_ids"] = gain.token_ids
        return chunks

    def bodies(self, gain: Gain) -> list[dict[str, Any]]:
        """What chunks tell of a gain."""
        return [self.body(gain.text)] if gain.text else []  # else part of a character, or what may become a stop string

    def body(self, text: str) -> dict[str, Any]:
        """What a chunk tells of some text."""
        return {"text": text}

    def reason(self, index: int, finish_reason: str | None) -> str | None:
        """Why a choice ended, of the ways there are to end."""
        return finish_reason

    def choice(self, completion: Completion, echoed: str) -> dict[str, Any]:
        """A choice with all its text."""
        return {"text": echoed + completion.output.text}

    def usage(self, generation: Generation) -> dict[str, Any]:
        """Tokens in and out."""
        return generation.usage()

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        choices = []
        for completion, echoed in zip(generation.completions, self.echoed(generation), strict=True):
            output = completion.output
            choice = {"index": output.index, **self.choice(completion, echoed), "logprobs": None}
            choice["finish_reason"] = self.reason(output.index, output.finish_reason)
            choice["stop_reason"] = output.stop_reason
            if self.asked.return_token_ids:
                choice["token_ids"] = output.token_ids
                choice["prompt_token_ids"] = completion.parent.prompt_token_ids
            choices.append(choice)
        return {**self.head, "choices": choices, "usage": self.usage(generation)}


async def complete(service: Service, request: Request) -> Response:
    """Answers `/v1/completions`."""
    asked = parse(await request.body(), CompletionRequest)
    try:
        generation = await begin(service, request, asked, _prompts(service, asked))
    except PromptError as error:
        raise placed(error, "prompt") from None
    form = Form(asked, head(service, request, "cmpl", "text_completion"))
    return await answer(service, request, generation, form)


async def begin(
    service: Service, request: Request, asked: Sampling, prompts: Coroutine[Any, Any, Prompts], **defaults: Any
) -> Generation:
    """Queues what is asked, unless the client goes first; `defaults` of sampling parameters that it leaves out.

    Raises as `Service.begin`, and ClientGoneError.
    """
    try:
        asked.check()
        service.check_model(asked.model)
        begun = asyncio.ensure_future(service.begin(asked, prompts, asked.sampling(**defaults)))
        try:
            return await unless_gone(request, begun)
        except BaseException:
            if begun.done() and not begun.cancelled() and begun.exception() is None:
                service.client.abort(begun.result())
            raise
    finally:
        prompts.close()


def placed(error: PromptError, field: str) -> InputError:
    """The same, naming the field that holds the prompt if it names none."""
    return error if error.field is not None else PromptError(str(error), field)


async def _prompts(service: Service, asked: CompletionRequest) -> Prompts:
    """The prompts; each with its text if that is to be echoed, though it came as token ids."""

    def check_count(count: int) -> None:
        service.check_count(count * (asked.n or 1))

    return await service.texts.prompts(asked.prompt, service.facts, check_count, bool(asked.echo))


def head(service: Service, request: Request, prefix: str, kind: str) -> dict[str, Any]:
    """What an answer and all its chunks begin with."""
    return {
        "id": f"{prefix}-{request.state.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
    }


async def answer(service: Service, request: Request, generation: Generation, form: Form) -> Response:
    """The generation in its form, whole or streamed."""
    events = _events(generation, form) if form.asked.stream else None
    return await ended(service, request, generation, events, lambda: form.whole(generation))


async def ended(
    service: Service,
    request: Request,
    generation: Generation,
    events: AsyncGenerator[bytes, None] | None,
    whole: Callable[[], Any],
    failed: Callable[[Exception], bytes] | None = None,
) -> Response:
    """A stream of these events, or without any the whole of it as JSON, once it has come.

    The generation ends with its answer. `failed`: as `EventStream` takes it.
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


async def _drained(generation: Generation) -> None:
    """Waits for its end. Raises what it failed with."""
    async for _ in generation.gains():
        pass


def _told_of_tokens(gain: Gain, generation: Generation) -> dict[str, Any]:
    """Where each token came from, when they came, and how the completion's drafts have fared up to here."""
    tokens = [
        {
            "id": piece.token_id,
            "text": piece.text,
            "draft_position": 0 if piece.draft_position is None else piece.draft_position + 1,
        }
        for piece in gain.pieces
    ]
    acceptance = generation.completions[gain.index].request.acceptance.report()
    return {"tokens": tokens, "seconds": generation.seconds(gain.index), "acceptance": acceptance.to_dict()}


async def _events(generation: Generation, form: Form) -> AsyncGenerator[bytes, None]:
    usage = {"usage": None} if form.asked.includes_usage else {}
    for choice in form.opening(generation):
        yield event({**form.head, "choices": [choice], **usage})
    async for gain in generation.gains():
        stop_reason = generation.completions[gain.index].output.stop_reason if gain.finish_reason else None
        choices = form.chunks(gain, stop_reason)
        if form.asked.returns_tokens:
            choices[-1]["speculative"] = _told_of_tokens(gain, generation)
        for choice in choices:
            yield event({**form.head, "choices": [choice], **usage})
    if form.asked.includes_usage:
        yield event({**form.head, "choices": [], "usage": form.usage(generation)})
    yield DONE
