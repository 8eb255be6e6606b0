"""An engine's process for a caller without an event loop: `LLM`'s other way to an engine."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple, TypeVar

from outrider.acceptance.watchdog import WatchState
from outrider.core.output import AcceptanceReport, AcceptanceTally, FinishReason, TokenDelta
from outrider.core.turns import FairLock, in_turn, watch_forks
from outrider.engine.completion import Completion
from outrider.engine.engine import Engine
from outrider.engine.generation import Generation, MakeDetokenizer
from outrider.engine.process.client import Counted, EngineClient
from outrider.errors import EngineClosedError, EngineForkedError, OptionError
from outrider.options import EngineOptions
from outrider.oracle import Choice

Made = TypeVar("Made")

NEVER = float("inf")
"""A caller who waits, waits as long as a step takes: only a process that has ended counts as dead."""


class _Came(NamedTuple):
    """What the engine's process sent for a completion."""

    generation: Generation
    completion: Completion
    delta: TokenDelta
    acceptance: AcceptanceTally
    num_cached: int


class _Receiver:
    """Stands for a generation on the client's thread, and keeps what comes for the caller's."""

    def __init__(self, generation: Generation, put: Callable[[_Came | tuple[Generation, Exception]], None]) -> None:
        self.completions, self.max_drafts = generation.completions, generation.max_drafts
        self._generation, self._put = generation, put

    def take(self, completion: Completion, delta: TokenDelta, acceptance: AcceptanceTally, num_cached: int) -> bool:
        """Keeps it; whether a stop string ends the completion is found when it is handed out."""
        self._put(_Came(self._generation, completion, delta, acceptance, num_cached))
        return False

    def fail(self, error: Exception) -> None:
        """Keeps the error."""
        self._put((self._generation, error))


class SyncEngineClient:
    """An `EngineClient` on a thread of its own. Deltas are handed out on the thread of a caller who waits.

    Threads of callers take turns. One that nobody closes ends its process when it is forgotten, or at exit.
    """

    def __init__(
        self, options: EngineOptions, progress: Counted | None = None, recording: Counted | None = None
    ) -> None:
        """Starts the process and waits until the model is loaded. Raises as `EngineClient.start`."""
        self.lock = FairLock()
        """Held by each call."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="outrider-client", daemon=True)
        self._thread.start()
        self._inbox: deque[_Came | tuple[Generation, Exception]] = deque()
        self._filled = threading.Event()
        self._released: deque[Completion] = deque()  # let go while another thread had its turn: to be aborted
        self._unusable: type[EngineClosedError | EngineForkedError] | None = None
        self._client = EngineClient(options, NEVER)
        self._end_forgotten = weakref.finalize(self, _end, self._client, self._loop)
        self._end_forgotten.atexit = False
        watch_forks(self)
        _open.add(self)
        try:
            facts = self._call(self._client.start(progress, recording))
        except BaseException:
            self.close()
            raise
        self.verifier, self.eos_token_ids = facts.verifier, facts.eos_token_ids
        self.vocab_size = facts.vocab_size
        self.sampling_defaults = facts.sampling_defaults

    def _call(self, work: Coroutine[Any, Any, Made]) -> Made:
        """Runs it on the client's thread. An interrupt cancels it there. EngineClosedError if `close` ends it."""
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise EngineClosedError from None
        try:
            return future.result()
        except CancelledError:
            raise EngineClosedError from None
        except BaseException:
            future.cancel()
            raise

    @property
    def choice(self) -> Choice:
        """The oracle's verdict, as the engine's process has it."""
        assert self._client.choice is not None
        return self._client.choice

    @property
    def engine(self) -> Engine:
        """There is none in this process: OptionError."""
        raise OptionError("the engine runs in a process of its own: leave enable_multiprocessing out to drive it")

    def acceptance(self) -> AcceptanceReport:
        """How drafts fared over the life of the engine, by its newest snapshot."""
        assert self._client.snapshot is not None
        return self._client.snapshot.acceptance

    def watchdog(self) -> WatchState:
        """What the watchdog knows. Raises EngineDeadError if the process has ended."""
        self.check_usable()
        return self._call(self._client.watchdog())

    @in_turn
    def add(self, generation: Generation, detokenizer: MakeDetokenizer) -> None:
        """Queues every completion and makes its detokenizer, or none: InputError as `Engine.add` raises it."""
        self.check_usable()
        self._abort_released()
        self._call(self._client.run(_Receiver(generation, self._put)))
        try:
            generation.detokenize(detokenizer)
        except BaseException:
            self.abort(generation.completions)
            raise

    @in_turn
    def step(self, generation: Generation) -> None:
        """Waits until something has come, and hands it out. Raises EngineClosedError after `close`.

        It does nothing if another thread has handed out something of the generation's.
        """
        self._abort_released()
        if generation.inbox.ended or generation.inbox.pieces:
            return
        self.check_usable()
        while not self._inbox:
            if generation.finished:  # another thread has taken what came of it
                return
            self._filled.wait()
            self._filled.clear()
            self.check_usable()
        while self._inbox:
            came = self._inbox.popleft()
            if isinstance(came, _Came):
                self._hand_out(came)
            else:
                generation, error = came
                generation.fail(error)

    @in_turn
    def abort(self, completions: Sequence[Completion]) -> None:
        """Drops those that are still in progress."""
        running = [completion for completion in completions if not completion.ended]
        for completion in running:
            completion.abort()
        self._end(running, FinishReason.ABORT)

    def release(self, completions: Sequence[Completion]) -> None:
        """As `abort`, but safe anywhere: a finalizer may run while another thread has its turn."""
        if not self.lock.acquire_at_once():
            self._released.extend(completions)
            return
        try:
            self.abort(completions)
        finally:
            self.lock.release()

    def _abort_released(self) -> None:
        while self._released:
            self.abort([self._released.popleft()])

    def close(self) -> None:
        """Ends the process and the thread; calls of other threads raise EngineClosedError. Idempotent."""
        if self._unusable is not None:
            return
        self._unusable = EngineClosedError
        self._filled.set()
        self._end_forgotten.detach()
        try:
            self._call(self._client.close())
        except BaseException:
            self._client.kill()
            raise
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def after_fork(self) -> None:
        """In a forked child: the process and the thread are the parent's."""
        self.lock, self._unusable = FairLock(), EngineForkedError
        self._end_forgotten.detach()

    def _put(self, came: _Came | tuple[Generation, Exception]) -> None:
        self._inbox.append(came)
        self._filled.set()

    def _hand_out(self, came: _Came) -> None:
        generation, completion = came.generation, came.completion
        if completion.ended:
            return  # aborted, and the engine did not know yet
        try:
            if generation.take(completion, came.delta, came.acceptance, came.num_cached):
                self._end([completion], FinishReason.STOP)
        except BaseException:
            self.abort([completion])
            raise

    def _end(self, completions: Sequence[Completion], reason: FinishReason) -> None:
        if completions and self._unusable is None:
            self._loop.call_soon_threadsafe(self._client.end, completions, reason)

    def check_usable(self) -> None:
        """Raises EngineClosedError after `close`, and EngineForkedError in a forked child."""
        if self._unusable is not None:
            raise self._unusable


_open: weakref.WeakSet[SyncEngineClient] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    """Before multiprocessing's own end, which would wait for a process that ignores its signal."""
    for client in list(_open):
        client.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_others())
    finally:
        loop.close()


async def _cancel_others() -> None:
    """Ends every other task of the loop, so that no thread waits for one that cannot go on."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _end(client: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
    """Ends the process and the thread of a client that was forgotten. It may run anywhere, so it waits for nothing."""
    ended = asyncio.run_coroutine_threadsafe(client.close(), loop)
    ended.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
