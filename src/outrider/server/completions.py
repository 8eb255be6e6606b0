"""`/v1/completions` and `/v1/chat/completions`: what a generation yields, in OpenAI's records."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.errors import InputError, PromptError
from outrider.server.fields import ChatRequest, CompletionRequest, Sampled, parse
from outrider.server.generation import Gain, Generation
from outrider.server.responses import DONE, EventStream, event, json_response, unless_gone
from outrider.server.service import Prompts, Service


@dataclass(frozen=True, slots=True)
class _Form:
    """How one kind of completion is written."""

    asked: Sampled
    head: dict[str, Any]

    def echoed(self, generation: Generation) -> list[str]:
        """The text before each choice's own."""
        echoes = isinstance(self.asked, CompletionRequest) and self.asked.echo
        return [completion.parent.prompt or "" if echoes else "" for completion in generation.completions]

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Choices that a stream begins with."""
        return [self.chunk(Gain(index, text)) for index, text in enumerate(self.echoed(generation)) if text]

    def chunk(self, gain: Gain, stop_reason: int | str | None = None) -> dict[str, Any]:
        """A choice of a stream."""
        return self._ids({**self.choice(gain.index, gain.text, gain.finish_reason), "stop_reason": stop_reason}, gain)

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A choice with all its text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _ids(self, choice: dict[str, Any], gain: Gain) -> dict[str, Any]:
        return {**choice, "token_ids": gain.token_ids} if self.asked.return_token_ids else choice

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        choices = []
        for completion, echoed in zip(generation.completions, self.echoed(generation), strict=True):
            output = completion.output
            choice = self.choice(output.index, echoed + output.text, output.finish_reason)
            choice["stop_reason"] = output.stop_reason
            if self.asked.return_token_ids:
                choice["token_ids"] = output.token_ids
                choice["prompt_token_ids"] = completion.parent.prompt_token_ids
            choices.append(choice)
        return {**self.head, "choices": choices, "usage": generation.usage()}


class _ChatForm(_Form):
    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Each message's role."""
        role = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            for index in range(len(generation.completions))
        ]

    def chunk(self, gain: Gain, stop_reason: int | str | None = None) -> dict[str, Any]:
        """What a message gained."""
        delta = {"content": gain.text} if gain.text else {}
        choice = {"index": gain.index, "delta": delta, "logprobs": None, "finish_reason": gain.finish_reason}
        return self._ids({**choice, "stop_reason": stop_reason}, gain)

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A message with all its text."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


async def complete(service: Service, request: Request) -> Response:
    """Answers `/v1/completions`."""
    asked = parse(await request.body(), CompletionRequest)
    try:
        generation = await _begin(service, asked, _prompts(service, asked))
    except PromptError as error:
        raise _placed(error, "prompt") from None
    form = _Form(asked, _head(service, request, "cmpl", "text_completion"))
    return await _answer(service, request, generation, form)


async def chat(service: Service, request: Request) -> Response:
    """Answers `/v1/chat/completions`."""
    asked = parse(await request.body(), ChatRequest)

    async def prompts() -> Prompts:
        return [(None, await service.texts.conversation(asked.messages, asked.chat_template_kwargs))]

    try:
        generation = await _begin(service, asked, prompts())
    except PromptError as error:
        raise _placed(error, "messages") from None
    kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    head = _head(service, request, "chatcmpl", kind)
    return await _answer(service, request, generation, _ChatForm(asked, head))


async def _begin(service: Service, asked: Sampled, prompts: Coroutine[Any, Any, Prompts]) -> Generation:
    try:
        asked.check()
        service.check_model(asked.model)
        return await service.begin(asked, prompts, asked.sampling())
    finally:
        prompts.close()


def _placed(error: PromptError, field: str) -> InputError:
    """The same, naming the field that holds the prompt if it names none."""
    return error if error.field is not None else PromptError(str(error), field)


async def _prompts(service: Service, asked: CompletionRequest) -> Prompts:
    """The prompts; each with its text if that is to be echoed, though it came as token ids."""
    prompts = await service.texts.prompts(asked.prompt)
    if not asked.echo:
        return prompts
    size = service.facts.vocab_size
    return [(text if text is not None else service.texts.decode(ids, size), ids) for text, ids in prompts]


def _head(service: Service, request: Request, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{request.state.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
    }


async def _answer(service: Service, request: Request, generation: Generation, form: _Form) -> Response:
    def closed() -> None:
        service.client.abort(generation)

    if form.asked.stream:
        return EventStream(_events(generation, form), closed)
    try:
        await unless_gone(request, _drained(generation))
    finally:
        closed()
    return json_response(form.whole(generation))


async def _drained(generation: Generation) -> None:
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


async def _events(generation: Generation, form: _Form) -> AsyncGenerator[bytes, None]:
    usage = {"usage": None} if form.asked.includes_usage else {}
    for choice in form.opening(generation):
        yield event({**form.head, "choices": [choice], **usage})
    async for gain in generation.gains():
        if not (gain.text or gain.finish_reason or form.asked.return_token_ids or form.asked.returns_tokens):
            continue  # part of a character, or what may become a stop string
        stop_reason = generation.completions[gain.index].output.stop_reason if gain.finish_reason else None
        choice = form.chunk(gain, stop_reason)
        if form.asked.returns_tokens:
            choice["speculative"] = _told_of_tokens(gain, generation)
        yield event({**form.head, "choices": [choice], **usage})
    if form.asked.includes_usage:
        yield event({**form.head, "choices": [], "usage": generation.usage()})
    yield DONE
