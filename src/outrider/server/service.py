"""What the routes share: the engine, the tokenizer, the metrics, and how a request becomes a generation."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from outrider.core.request import check_prompt_length
from outrider.core.sampling import SamplingParams
from outrider.engine.generation import AsyncGeneration
from outrider.engine.process.client import EngineClient
from outrider.engine.process.messages import Facts
from outrider.engine.prompts import check_stop_ids
from outrider.errors import InputError, OverloadError, shortened
from outrider.server.http.metrics import Metrics
from outrider.server.http.responses import unless_gone
from outrider.server.http.tracing import Tracing
from outrider.server.lanes import SMALL
from outrider.server.openai.schemas import Sampling
from outrider.server.tokenizer_service import TokenizerService

Made = TypeVar("Made")

Prompts = list[tuple[str | None, list[int]]]
"""Each with its text, where it was given as text."""


@dataclass(slots=True)
class Service:
    """One engine, served."""

    client: EngineClient
    facts: Facts
    tokenizer: TokenizerService
    metrics: Metrics
    model_name: str
    max_waiting: int
    request_timeout: float | None = None  # seconds a request may take
    tracing: Tracing | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    _num_arriving: int = 0  # requests whose prompts are being encoded

    @property
    def status(self) -> str:
        """What it does at this moment: "ok" while it takes requests, else "restarting", "dead" or "draining"."""
        if self.client.restarting:
            return "restarting"
        if not self.client.alive:
            return "dead"
        return "draining" if self.draining else "ok"

    def check_model(self, name: str | None) -> None:
        """Raises 404 for a model that is not served."""
        if name is not None and name != self.model_name:
            raise HTTPException(404, f"the model {shortened(name)!r} does not exist: this server has {self.model_name}")

    async def read(self, request: Request, make: Callable[[bytes], Made]) -> Made:
        """What is made of a request's body: of a large one by another thread, unless the client goes first."""
        body = await request.body()
        if len(body) <= SMALL:
            return make(body)
        return await unless_gone(request, self.tokenizer.read(len(body), lambda: make(body)))

    async def begin(self, asked: Sampling, prompts: Awaitable[Prompts], params: SamplingParams) -> AsyncGeneration:
        """Queues a request's completions. `prompts` is awaited only if there may be room.

        Raises OverloadError, InputError as the engine does, EngineDeadError.
        """
        arrival = time.monotonic()
        max_drafts = None
        if asked.speculative is not None:
            max_drafts = asked.speculative.max_drafts(self.facts.num_speculative_tokens)
        check_stop_ids(params, self.facts.vocab_size)
        params = params.stopping_at(self.tokenizer.decoder.special_tokens, self.facts.vocab_size)
        self.check_count(params.n)
        self._check_room(1)
        self._num_arriving += 1
        try:
            encoded = await prompts
            count = len(encoded) * params.n
            self.check_count(count)
            for _, ids in encoded:
                check_prompt_length(len(ids), self.facts.max_model_len)
            contexts = await self.tokenizer.contexts(
                [ids for _, ids in encoded], self.facts.vocab_size, params.skip_special_tokens
            )
        finally:
            self._num_arriving -= 1
        self._check_room(count)
        generation = AsyncGeneration(
            encoded,
            params,
            self.metrics,
            eos_token_ids=self.facts.eos_token_ids,
            verifier=self.facts.verifier,
            max_drafts=max_drafts,
            arrival=arrival,
        )
        generation.detokenize(self.tokenizer.detokenizer, contexts)
        if self.tracing is not None:
            self.tracing.began(generation)
        await self.client.run(generation)
        return generation

    @property
    def _capacity(self) -> int:
        """Most completions that run and wait at once."""
        return self.facts.max_num_seqs + self.max_waiting

    def check_count(self, count: int) -> None:
        """Raises InputError for more completions of one request than may ever be in flight."""
        if count > self._capacity:
            raise InputError(
                f"{count} completions are asked for, prompts times n: this server takes at most {self._capacity}", "n"
            )

    def _check_room(self, count: int) -> None:
        self.client.check_alive()
        under_way = self.client.num_in_flight + self._num_arriving
        if under_way + count > self._capacity:
            raise OverloadError(
                f"{under_way} completions are in flight, and at most {self._capacity} may be: try again later",
                self.metrics.retry_after(),
            )

    def model_record(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it, with the oracle's verdict."""
        facts = self.facts
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "outrider",
            "max_model_len": facts.max_model_len,
            "dtype": facts.dtype,
            "device": facts.device,
            "runner": facts.runner,
            "forced": facts.forced,
            "passed_over": facts.passed_over,
            "method": facts.method,
            "num_speculative_tokens": facts.num_speculative_tokens,
            "verifier": facts.verifier,
            "faithful": facts.faithful,
        }
