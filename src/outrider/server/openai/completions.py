"""`/v1/completions`: prompts in, their continuations out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.completion import Completion
from outrider.engine.generation import AsyncGeneration, CompletionDelta
from outrider.server.openai.base import ResponseBuilder, answer, begin, head, naming
from outrider.server.openai.record import parse
from outrider.server.openai.schemas import CompletionRequest
from outrider.server.service import Prompts, Service


async def complete(service: Service, request: Request) -> Response:
    """Answers `/v1/completions`."""
    asked = await service.read(request, lambda body: parse(body, CompletionRequest))
    num_bytes = len(await request.body())
    with naming("prompt"):
        generation = await begin(service, request, asked, _prompts(service, asked, num_bytes))
    builder = _TextBuilder(asked, head(service, request, "cmpl", "text_completion"), bool(asked.echo))
    return await answer(service, request, generation, builder)


async def _prompts(service: Service, asked: CompletionRequest, num_bytes: int) -> Prompts:
    """The prompts; each with its text if that is to be echoed, though it came as token ids."""

    def check_count(count: int) -> None:
        service.check_count(count * (asked.n or 1))

    return await service.tokenizer.prompts(asked.prompt, service.facts, check_count, bool(asked.echo), num_bytes)


@dataclass(frozen=True, slots=True)
class _TextBuilder(ResponseBuilder):
    """Choices of text, each after its prompt if that is to be echoed."""

    echoes: bool

    def _echoed(self, completion: Completion) -> str:
        return completion.parent.prompt or "" if self.echoes else ""

    def opening(self, generation: AsyncGeneration) -> list[dict[str, Any]]:
        """Each prompt that is to be echoed."""
        echoed = [(completion.index, self._echoed(completion)) for completion in generation.completions]
        return [chunk for index, text in echoed if text for chunk in self.chunks(CompletionDelta(index, text))]

    def body(self, text: str) -> dict[str, Any]:
        """Some text."""
        return {"text": text}

    def content(self, completion: Completion) -> dict[str, Any]:
        """All text of a completion."""
        return {"text": self._echoed(completion) + completion.output.text}
