"""One request's completions as they come: deltas of the engine in, text for whoever waits out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from outrider.core.request import Request
from outrider.core.sampling import SamplingParams
from outrider.engine.completion import Completion, Inbox
from outrider.engine.outputs import CompletionOutput, Piece, RequestOutput
from outrider.engine.process.messages import Delta
from outrider.server.tokenizer_service import Texts


@dataclass(slots=True)
class Gain:
    """What one completion gained since it was last asked."""

    index: int  # of the completion, over all prompts
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # the same, one a token
    finish_reason: str | None = None


class Meter(Protocol):
    """What is told of tokens and ends, for metrics."""

    def began(self, completion: Completion) -> None:
        """A completion got its first tokens."""

    def gained(self, num_tokens: int, since: float, now: float, first: bool) -> None:
        """A completion gained tokens at `now`, having waited from `since`: its last ones, or its arrival."""

    def ended(self, completion: Completion, arrival: float, now: float) -> None:
        """A completion is finished."""


class Generation:
    """All completions of one request, and who waits for them."""

    def __init__(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams,
        texts: Texts,
        meter: Meter,
        *,
        eos_token_ids: Sequence[int],
        verifier: str,
        max_drafts: int | None = None,
        arrival: float | None = None,
    ) -> None:
        """`max_drafts`: as `Engine.add` takes it; `arrival`: when the request came, by time.monotonic()."""
        self.arrival = time.monotonic() if arrival is None else arrival
        self._meter = meter
        self._inbox = Inbox(keeps_pieces=True)
        self._woken = asyncio.Event()
        self.params = params
        self.error: Exception | None = None
        """What the whole of it failed with."""
        self.seconds_to_first_token: float | None = None
        """From its arrival, once there is one."""
        self.outputs: list[RequestOutput] = []
        """One a prompt."""
        self.completions: list[Completion] = []
        """Of all prompts, in order: a completion's index is its place here."""
        for number, (text, ids) in enumerate(prompts):
            parent = RequestOutput(str(number), text, ids, [], verifier)
            self.outputs.append(parent)
            prompt = tuple(ids)
            for index in range(params.n):
                request = Request("", prompt, params.of_completion(index), max_drafts=max_drafts)
                output = CompletionOutput(len(self.completions), "", [])
                completion = Completion(request, parent, output, self._inbox, eos_token_ids)
                completion.detokenizer = texts.detokenizer(ids, params)
                parent.outputs.append(output)
                self.completions.append(completion)
        self._last = [self.arrival] * len(self.completions)

    def take(self, delta: Delta) -> bool:
        """Adds what a step brought. True if nothing more is wanted of this request, which the engine cannot know."""
        index = int(delta.id.rpartition("-")[2])
        completion = self.completions[index]
        completion.request.acceptance = delta.tally()
        completion.request.num_cached = delta.num_cached
        now = time.monotonic()
        first = not completion.output.token_ids
        try:
            stopped = completion.take(delta.tokens_gained())
        except Exception as error:
            self.fail(error)
            return True
        if delta.tokens:
            if self.seconds_to_first_token is None:
                self.seconds_to_first_token = now - self.arrival
            if first:
                self._meter.began(completion)
            self._meter.gained(len(delta.tokens), self._last[index], now, first)
            self._last[index] = now
        if completion.ended:
            self._meter.ended(completion, self.arrival, now)
        self._woken.set()
        return stopped

    def fail(self, error: Exception) -> None:
        """Nothing more comes: whoever waits is given the error, after what came before it."""
        self.error = self.error or error
        for completion in self.completions:
            completion.abort()
        self._woken.set()

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(completion.ended for completion in self.completions)

    async def gains(self) -> AsyncIterator[Gain]:
        """What came, as it comes; a completion's last has its finish reason. Raises what the generation failed with."""
        pieces = self._inbox.pieces
        while True:
            self._woken.clear()
            gains: dict[int, Gain] = {}
            while pieces:
                piece = pieces.popleft()
                gain = gains.setdefault(piece.index, Gain(piece.index))
                gain.text += piece.text
                gain.token_ids.append(piece.token_id)
                gain.pieces.append(piece)
                gain.finish_reason = piece.finish_reason
            for gain in gains.values():
                yield gain
            if pieces:
                continue
            if self.error is not None:
                raise self.error
            if self.finished:
                return
            await self._woken.wait()

    def seconds(self, index: int) -> float:
        """From the request's arrival to a completion's newest tokens."""
        return self._last[index] - self.arrival

    def usage(self) -> dict[str, Any]:
        """Tokens in and out, and what drafts were worth: OpenAI's record, with one more entry."""
        prompt = sum(len(output.prompt_token_ids) for output in self.outputs)
        generated = sum(len(completion.output.token_ids) for completion in self.completions)
        acceptance = sum((output.acceptance for output in self.outputs[1:]), self.outputs[0].acceptance)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in self.outputs)},
            "speculative": acceptance.to_dict(),
        }
