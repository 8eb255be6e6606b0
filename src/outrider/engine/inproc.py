"""The client of an engine in the caller's process. The engine steps while the caller waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from outrider.acceptance.watchdog import WatchState
from outrider.core.output import AcceptanceReport, FinishReason, TokenDelta
from outrider.core.request import Request
from outrider.core.turns import FairLock, in_turn
from outrider.engine.completion import Completion
from outrider.engine.engine import Engine
from outrider.engine.generation import Generation, MakeDetokenizer
from outrider.oracle import Choice


class InprocClient:
    """Queues generations with an engine, and runs a step whenever a caller waits for one of them.

    Threads take turns, a step each: it hands out what everybody's requests gained.
    """

    def __init__(self, engine: Engine) -> None:
        """The engine may be driven beside it; requests that are not of this client are passed over."""
        self.engine = engine
        self.completions: dict[str, tuple[Generation, Completion]] = {}
        """Those in progress, by the id of their request."""
        self._gained: deque[tuple[TokenDelta, Request]] = deque()  # of the last step, not yet handed out
        self._released: deque[Completion] = deque()  # let go while the engine was busy: to be aborted
        self._num_dropped = 0  # requests that we dropped ourselves, or have taken note of

    @property
    def lock(self) -> FairLock:
        """The engine's."""
        return self.engine.lock

    @property
    def choice(self) -> Choice:
        """The oracle's verdict."""
        return self.engine.choice

    @property
    def verifier(self) -> str:
        """The verifier's name."""
        return self.engine.resolved.runner.verifier.name

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """What ends a text."""
        return self.engine.resolved.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has."""
        return self.engine.resolved.runner.model_config.vocab_size

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """What requests take that do not say otherwise."""
        return self.engine.resolved.sampling_defaults

    def acceptance(self) -> AcceptanceReport:
        """How drafts fared over the life of the engine."""
        return self.engine.acceptance()

    def watchdog(self) -> WatchState:
        """What the watchdog knows."""
        return self.engine.watchdog.state()

    def check_usable(self) -> None:
        """As `Engine.check_usable`."""
        self.engine.check_usable()

    @in_turn
    def add(self, generation: Generation, detokenizer: MakeDetokenizer) -> None:
        """Queues every completion and makes its detokenizer, or none: InputError as `Engine.add` raises it."""
        self.engine.check_usable()
        self._abort_released()
        try:
            for completion in generation.completions:
                parent = completion.parent
                completion.id = f"{parent.request_id}-{completion.output.index}"
                request = self.engine.add(
                    completion.id, parent.prompt_token_ids, completion.sampling, generation.max_drafts
                )
                completion.acceptance = request.acceptance
                self.completions[completion.id] = generation, completion
            generation.detokenize(detokenizer)
        except BaseException:
            self.abort(generation.completions)
            raise

    @in_turn
    def step(self, generation: Generation) -> None:
        """Runs one step, and hands every completion in progress what it gained.

        It does nothing if a step of another thread has brought the generation something.

        An error of one completion ends that one alone; an interrupt leaves what is not handed out for the next call.
        A completion whose request the engine no longer knows ends as aborted, so that no caller waits for ever.
        """
        self._abort_released()
        if generation.inbox.ended or generation.inbox.pieces:
            return
        if not self._gained:
            self._gained.extend(self.engine.step())
            self._abort_released()
        while self._gained:
            delta, request = self._gained.popleft()
            found = self.completions.get(delta.request_id)
            if found is not None:  # else a request that was added to the engine directly
                self._hand_out(*found, delta, request)
        if self.engine.num_dropped != self._num_dropped or not self.engine.has_work:
            self.engine.check_usable()
            self._num_dropped = self.engine.num_dropped
            for _, completion in list(self.completions.values()):
                if not self.engine.knows(completion.id):
                    self._drop(completion)

    def _hand_out(self, generation: Generation, completion: Completion, delta: TokenDelta, request: Request) -> None:
        try:
            if generation.take(completion, delta, request.acceptance, request.num_cached):
                self._finish(completion, FinishReason.STOP)
        except BaseException:
            self._drop(completion)
            raise
        if completion.ended:
            self.completions.pop(completion.id, None)

    def _finish(self, completion: Completion, reason: FinishReason) -> None:
        self._num_dropped += self.engine.finish(completion.id, reason)

    def _drop(self, completion: Completion) -> None:
        """Ends a completion and its request, if that is not over."""
        self.completions.pop(completion.id, None)
        self._finish(completion, FinishReason.ABORT)
        completion.abort()

    @in_turn
    def abort(self, completions: Sequence[Completion]) -> None:
        """Drops those that are still in progress."""
        for completion in completions:
            if completion.id in self.completions:
                self._drop(completion)

    def release(self, completions: Sequence[Completion]) -> None:
        """As `abort`, but safe anywhere: a finalizer may run in the middle of a step, and must not disturb it."""
        lock = self.lock
        if not lock.acquire_at_once():
            self._released.extend(completions)
            return
        try:
            if self.engine.busy:
                self._released.extend(completions)
            else:
                self.abort(completions)
        finally:
            lock.release()

    def _abort_released(self) -> None:
        while self._released:
            self.abort([self._released.popleft()])

    def close(self) -> None:
        """Frees the model and the cache. Idempotent."""
        self.engine.close()
