"""One call's completions, of `LLM` or of the server: what the engine is asked, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from outrider.core.output import AcceptanceReport, AcceptanceTally, TokenDelta
from outrider.core.sampling import SamplingParams
from outrider.engine.completion import Completion, Inbox
from outrider.engine.detokenize import Detokenizer
from outrider.engine.outputs import CompletionOutput, Piece, RequestOutput

MakeDetokenizer = Callable[[Sequence[int], SamplingParams], Detokenizer | None]
"""A detokenizer for a completion of this prompt with these parameters; None: it has no text."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a generation's prompts and completions, and how its drafts fared."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    acceptance: AcceptanceReport


class Generation:
    """All completions of some prompts. A client of an engine queues it and hands it what each step brought."""

    def __init__(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],  # text, where it was given as text, and token ids
        sampling: Sequence[SamplingParams],  # one a prompt
        *,
        eos_token_ids: Sequence[int],
        verifier: str,
        keeps_pieces: bool = True,
        max_drafts: int | None = None,
        first_number: int = 0,
    ) -> None:
        """`max_drafts`: as `Engine.add` takes it. `first_number`: id of the first prompt's output."""
        self.inbox = Inbox(keeps_pieces)
        self.max_drafts = max_drafts
        self.outputs: list[RequestOutput] = []
        """One a prompt."""
        self.completions: list[Completion] = []
        """Of all prompts, in order of their index."""
        for number, ((text, ids), params) in enumerate(zip(prompts, sampling, strict=True), start=first_number):
            parent = RequestOutput(str(number), text, ids, [], verifier)
            self.outputs.append(parent)
            for index in range(params.n):
                output = CompletionOutput(index, "", [])
                own = params.of_completion(index)
                parent.outputs.append(output)
                self.completions.append(
                    Completion(len(self.completions), own, parent, output, self.inbox, eos_token_ids)
                )

    def detokenize(self, make: MakeDetokenizer, contexts: Sequence[Sequence[int]] | None = None) -> None:
        """Gives each completion its detokenizer. `contexts`: what of each prompt stands for it; left out, all of it."""
        completions = iter(self.completions)
        for number, output in enumerate(self.outputs):
            context = output.prompt_token_ids if contexts is None else contexts[number]
            for completion in islice(completions, len(output.outputs)):
                completion.detokenizer = make(context, completion.sampling)

    def take(self, completion: Completion, delta: TokenDelta, acceptance: AcceptanceTally, num_cached: int) -> bool:
        """Adds what a step brought. True if the engine must end the request, which it cannot know by itself.

        What goes wrong with one completion ends it with that error, and leaves the others alone.
        """
        try:
            return completion.take(delta, acceptance, num_cached)
        except Exception as error:
            completion.abort(error)
            return True

    def fail(self, error: Exception) -> None:
        """Nothing more comes: every completion that has not ended ends with the error."""
        for completion in self.completions:
            completion.abort(error)

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(completion.ended for completion in self.completions)

    def usage(self) -> Usage:
        """Tokens in and out so far."""
        return Usage(
            prompt_tokens=sum(len(output.prompt_token_ids) for output in self.outputs),
            completion_tokens=sum(len(completion.output.token_ids) for completion in self.completions),
            cached_tokens=sum(output.num_cached_tokens for output in self.outputs),
            acceptance=sum((output.acceptance for output in self.outputs), AcceptanceReport()),
        )

    def ended(self) -> list[Completion]:
        """The completions that ended since the last call. Raises the error of one that was aborted by it.

        One with the finish reason "error" is like any other: its output holds the error.
        """
        ended = []
        while self.inbox.ended:
            completion = self.inbox.ended.popleft()
            if completion.error is not None and completion.output.error is None:
                raise completion.error
            ended.append(completion)
        return ended


@dataclass(slots=True)
class CompletionDelta:
    """What one completion gained since the last look."""

    index: int  # of the completion, over all prompts
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # the same, one a token
    finish_reason: str | None = None


class Observer(Protocol):
    """What counts tokens and times, for metrics."""

    def began(self, completion: Completion) -> None:
        """A completion got its first tokens."""

    def gained(self, num_tokens: int, since: float, now: float, first: bool) -> None:
        """A completion gained tokens at `now`, having waited from `since`: its last ones, or its arrival."""

    def ended(self, completion: Completion, arrival: float, now: float) -> None:
        """A completion is finished."""


class AsyncGeneration(Generation):
    """A generation that one task of an event loop awaits, and an observer times."""

    def __init__(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams,
        observer: Observer,
        *,
        eos_token_ids: Sequence[int],
        verifier: str,
        max_drafts: int | None = None,
        arrival: float | None = None,
    ) -> None:
        """`params`: of every prompt. `arrival`: when the request came, by time.monotonic(); left out, now."""
        super().__init__(
            prompts,
            [params] * len(prompts),
            eos_token_ids=eos_token_ids,
            verifier=verifier,
            max_drafts=max_drafts,
        )
        self.params = params
        self.arrival = time.monotonic() if arrival is None else arrival
        self.error: Exception | None = None
        """What it failed with."""
        self.seconds_to_first_token: float | None = None
        """From its arrival, once there is one."""
        self._observer = observer
        self._changed = asyncio.Event()
        self._last = [self.arrival] * len(self.completions)

    def take(self, completion: Completion, delta: TokenDelta, acceptance: AcceptanceTally, num_cached: int) -> bool:
        """As any, and times it."""
        # Another one of the request has failed, and the engine does not know yet.
        if completion.output.finish_reason is not None:
            return True
        index, now = completion.index, time.monotonic()
        first = not completion.output.token_ids
        stopped = super().take(completion, delta, acceptance, num_cached)
        if completion.error is not None:
            self._observer.ended(completion, self.arrival, now)
            self.fail(completion.error)
            return True
        if delta.tokens:
            if self.seconds_to_first_token is None:
                self.seconds_to_first_token = now - self.arrival
            if first:
                self._observer.began(completion)
            self._observer.gained(len(delta.tokens), self._last[index], now, first)
            self._last[index] = now
        if completion.ended:
            self._observer.ended(completion, self.arrival, now)
        self._changed.set()
        return stopped

    def fail(self, error: Exception) -> None:
        """Nothing more comes: `deltas` raises the error after what came before it."""
        self.error = self.error or error
        super().fail(error)
        self._changed.set()

    async def deltas(self) -> AsyncIterator[CompletionDelta]:
        """What came, as it comes; a completion's last has its finish reason. Raises what the generation failed with."""
        pieces = self.inbox.pieces
        while True:
            self._changed.clear()
            deltas: dict[int, CompletionDelta] = {}
            while pieces:
                piece = pieces.popleft()
                delta = deltas.setdefault(piece.index, CompletionDelta(piece.index))
                delta.text += piece.text
                delta.token_ids.append(piece.token_id)
                delta.pieces.append(piece)
                delta.finish_reason = piece.finish_reason
            for delta in deltas.values():
                yield delta
            if pieces:
                continue
            if self.error is not None:
                raise self.error
            if self.finished:
                return
            await self._changed.wait()

    def seconds(self, index: int) -> float:
        """From the request's arrival to a completion's newest tokens."""
        return self._last[index] - self.arrival
