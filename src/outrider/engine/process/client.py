"""The near end of an engine's process: requests out, tokens in, and whether it lives."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import multiprocessing
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from outrider.acceptance.watchdog import WatchState
from outrider.core.output import AcceptanceTally, FinishReason, TokenDelta
from outrider.core.sampling import SamplingParams
from outrider.core.turns import watch_forks
from outrider.engine.completion import Completion
from outrider.engine.process.host import run
from outrider.engine.process.messages import (
    Add,
    AskWatchdog,
    Building,
    Delta,
    End,
    Facts,
    Failed,
    FromEngine,
    Progress,
    Prompt,
    Quit,
    Ready,
    Refused,
    Snapshot,
    Taken,
    ToEngine,
    Watchdog,
)
from outrider.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineForkedError,
    EngineRestartingError,
    OutriderError,
    rebuilt,
)
from outrider.options import EngineOptions
from outrider.oracle import Choice

logger = logging.getLogger("outrider")

Counted = Callable[[int, int], None]
"""Called with how much is done, and how much there is in all."""

CHECK_SECONDS = 0.25
"""Between two looks at whether the engine has shown a sign of life."""

MAX_RETRY_SECONDS = 60
"""The longest wait that a client is asked for."""

QUIT_SECONDS = 5.0
"""Time for the process to end by itself after `Quit`."""


def retry_seconds(expected: float) -> int:
    """The wait that a client is asked for, in whole seconds, given the expected time."""
    return max(1, min(MAX_RETRY_SECONDS, math.ceil(expected)))


def _for_engine(sampling: SamplingParams) -> dict[str, Any]:
    """What the engine reads of sampling parameters. It sees no text, so stop strings stay here."""
    return {name: getattr(sampling, name) for name in SamplingParams.__dataclass_fields__ if name != "stop"}


class Receiver(Protocol):
    """What a client queues and hands deltas to: a `Generation`, or a proxy of one."""

    completions: list[Completion]
    max_drafts: int | None

    def take(self, completion: Completion, delta: TokenDelta, acceptance: AcceptanceTally, num_cached: int) -> bool:
        """As `Generation.take`."""

    def fail(self, error: Exception) -> None:
        """As `Generation.fail`."""


async def _ended(process: SpawnProcess, seconds: float) -> bool:
    """Whether the process ends within so many seconds, even if another part of the program has waited for it.

    No thread waits here: at exit none can be started.
    """
    deadline = time.monotonic() + seconds
    while not wait([process.sentinel], 0):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.02)
    # It has ended, so this does not wait: it takes the entry of the process away.
    process.join(1.0)
    return True


class EngineClient:
    """Starts the engine's process, and talks to it from one event loop."""

    def __init__(self, options: EngineOptions, timeout: float, log_format: str = "text") -> None:
        """`timeout`: seconds of silence after which the engine counts as hung. `start` does the work."""
        self._options, self._timeout, self._log_format = options, timeout, log_format
        self._directory = Path(tempfile.mkdtemp(prefix="outrider-"))  # readable by this user alone
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: SpawnProcess | None = None
        self._num_started = 0
        self._start_seconds = 0.0  # that the last start took
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._tasks: list[asyncio.Task[None]] = []
        self._requests: dict[str, tuple[Receiver, Completion]] = {}  # in flight, by the engine's id
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._heard = 0.0
        self._ready: asyncio.Future[Ready] | None = None
        self._counted: dict[str, Counted | None] = {}  # callbacks by `Building.what`
        self.restarting = False
        """Whether the engine is dead and another will replace it; set by the owner, who decides that."""
        self.snapshot: Snapshot | None = None
        """The newest; None until the engine is ready. A dead engine has nothing in flight."""
        self.choice: Choice | None = None
        """The oracle's verdict, once the engine is ready."""
        self.cause_of_death: OutriderError | None = None
        self.on_death: Callable[[], None] = lambda: None
        """Called once, when the engine is found dead or hung, after every waiting request has failed."""
        self._unusable: type[EngineClosedError | EngineForkedError] | None = None
        watch_forks(self)

    @property
    def alive(self) -> bool:
        """Whether requests can be run."""
        return self.cause_of_death is None and not self.restarting and self._unusable is None

    def check_alive(self) -> None:
        """Raises EngineDeadError if no requests can be run, and EngineRestartingError if they can soon."""
        if self._unusable is not None:
            raise self._unusable
        if self.restarting:
            said = "the engine failed and is being restarted: try again later"
            raise EngineRestartingError(said, retry_seconds(self._start_seconds))
        if self.cause_of_death is not None:
            raise EngineDeadError("the engine is dead, and runs no more requests") from self.cause_of_death

    @property
    def num_in_flight(self) -> int:
        """Completions that the engine was given and has not ended."""
        return len(self._requests)

    async def start(self, progress: Counted | None = None, recording: Counted | None = None) -> Facts:
        """Waits until the model is loaded, and returns what is served. The callbacks are those of `build_engine`.

        Raises what building an Engine raises, and EngineDeadError if the process ends without a word.
        """
        if self._unusable is not None:
            raise self._unusable
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        self.cause_of_death = None
        self._ready = loop.create_future()
        self._counted = {"weights": progress, "programs": recording}
        self._num_started += 1
        address = f"ipc://{self._directory}/engine-{self._num_started}"
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._process = multiprocessing.get_context("spawn").Process(
            target=run, args=(self._options, address, self._log_format), name="outrider-engine", daemon=True
        )
        self._process.start()
        loop.add_reader(self._process.sentinel, self._exited, self._process)
        self._tasks.append(loop.create_task(self._listen(self._socket)))
        ready = await self._ready
        if self.cause_of_death is not None:  # between its being ready and now
            raise self.cause_of_death
        self.snapshot, self.choice = ready.snapshot, pickle.loads(ready.choice)
        self._heard = time.monotonic()
        self._start_seconds = self._heard - begun
        self._tasks.append(loop.create_task(self._watch(self._process)))
        return ready.facts

    async def restart(self) -> Facts:
        """Starts another process after one that died or hangs. `restarting` is False once it is ready.

        Raises EngineDeadError if that fails, or takes much longer than the last start took.
        """
        longest = self._timeout + 3 * self._start_seconds
        try:
            async with asyncio.timeout(longest):
                await self._clear(0.0)
                facts = await self.start()
        except Exception as error:
            said = f"it was not ready after {longest:.0f} seconds" if isinstance(error, TimeoutError) else error
            self.cause_of_death = EngineDeadError(f"the engine could not be restarted: {said}")
            raise self.cause_of_death from error
        self.restarting = False
        return facts

    async def run(self, generation: Receiver) -> None:
        """Queues all completions of a generation, or none: InputError as `Engine.add` raises it."""
        self.check_alive()
        number = next(self._numbers)
        prompts = []
        for completion in generation.completions:
            completion.id = f"{number}-{completion.index}"
            ids, sampling = completion.parent.prompt_token_ids, _for_engine(completion.sampling)
            prompts.append(Prompt(completion.id, ids, sampling, generation.max_drafts))
        self._requests |= {completion.id: (generation, completion) for completion in generation.completions}
        try:
            await self._answer(Add(number, prompts))
        except BaseException:
            self.abort(generation)
            raise

    def abort(self, generation: Receiver) -> None:
        """Drops what of a generation is still in flight, before the engine's next step."""
        self.end(generation.completions, FinishReason.ABORT)

    def end(self, completions: Sequence[Completion], reason: FinishReason) -> None:
        """Ends those that are still in flight, before the engine's next step."""
        ids = [completion.id for completion in completions]
        self._end([request_id for request_id in ids if self._requests.pop(request_id, None)], reason)

    async def watchdog(self) -> WatchState:
        """What the engine's watchdog knows. Raises EngineDeadError."""
        self.check_alive()
        state: WatchState = pickle.loads(await self._answer(AskWatchdog(next(self._numbers))))
        return state

    async def _answer(self, message: Add | AskWatchdog) -> Any:
        """Sends a message, and waits for the answer of its number."""
        self._answers[message.number] = answer = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            return await answer
        finally:
            self._answers.pop(message.number, None)

    async def close(self) -> None:
        """Ends the process, in its own time or by force, and the wire. Idempotent."""
        if self._unusable is EngineForkedError:
            return
        listens = self.alive and self._ready is not None and self._ready.done()
        self._unusable = EngineClosedError
        await self._clear(QUIT_SECONDS if listens else 0.0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Ends the process by force, from any thread. `close` must have been called, or have failed."""
        if self._process is not None and self._process.pid is not None and self._unusable is not EngineForkedError:
            self._process.kill()

    def after_fork(self) -> None:
        """In a forked child: the process, the wire and its directory are the parent's."""
        self._unusable = EngineForkedError
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]  # no child of this one

    async def _clear(self, seconds: float) -> None:
        """Ends the process, after so many seconds by force, and whatever listened to it."""
        process = self._process
        if process is not None and process.pid is not None and process.is_alive():
            asyncio.get_running_loop().remove_reader(process.sentinel)
            self._send(Quit())
            if not await _ended(process, seconds):
                process.kill()
                await _ended(process, math.inf)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close(linger=0)

    def _send(self, message: ToEngine) -> None:
        """Never waits: the wire holds any number of messages."""
        assert self._socket is not None
        self._socket.send(msgspec.msgpack.encode(message))

    def _end(self, ids: Sequence[str], reason: FinishReason) -> None:
        if ids and self.alive:
            self._send(End(list(ids), reason))

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = await socket.recv()
            self._heard = time.monotonic()
            try:
                self._take(self._decoder.decode(message))
            except Exception as error:  # a bug of ours: no request may wait for what was lost
                logger.exception("a message of the engine could not be taken in")
                self._die(EngineDeadError(f"the server could not take in what the engine sent: {error!r}"))

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Progress):
            if message.snapshot is not None and self.cause_of_death is None:
                self.snapshot = message.snapshot
            self._hand_out(message.deltas)
        elif isinstance(message, Taken | Refused | Watchdog):
            answer = self._answers.get(message.number)
            if answer is None or answer.done():
                return
            if isinstance(message, Taken):
                answer.set_result(None)
            elif isinstance(message, Watchdog):
                answer.set_result(message.state)
            else:
                answer.set_exception(rebuilt(message.error, message.message, message.field))
        elif isinstance(message, Building):
            counted = self._counted[message.what]
            if counted is not None:
                counted(message.done, message.total)
        elif isinstance(message, Ready):
            assert self._ready is not None
            self._ready.set_result(message)
        else:
            assert isinstance(message, Failed)
            self._die(rebuilt(message.error, message.message))

    def _hand_out(self, deltas: Iterable[Delta]) -> None:
        stopped = []
        for delta in deltas:
            found = self._requests.get(delta.id)
            if found is None:
                continue  # aborted, and the engine did not know yet
            generation, completion = found
            if generation.take(completion, delta.tokens_gained(), delta.tally(), delta.num_cached):
                stopped.append(delta.id)
            elif delta.finish_reason is None:
                continue
            del self._requests[delta.id]
        self._end(stopped, FinishReason.STOP)

    async def _watch(self, process: SpawnProcess) -> None:
        """Kills an engine that is silent for too long. It reports every half second, unless a step takes longer."""
        while self.cause_of_death is None:
            before = time.monotonic()
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            silent = now - self._heard
            if silent > self._timeout and now - before < 2 * CHECK_SECONDS:  # else it is we who were held up
                self._die(EngineDeadError(f"the engine has been silent for {silent:.0f} seconds: it hangs"))
                process.kill()

    def _exited(self, process: SpawnProcess) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.sentinel)
        loop.call_later(CHECK_SECONDS, self._mourn, process)  # its last words may still be on the wire

    def _mourn(self, process: SpawnProcess) -> None:
        if process is not self._process:
            return  # another one has replaced it
        process.join(0)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        self._die(EngineDeadError(f"the engine's process {how}"))

    def _die(self, cause: OutriderError) -> None:
        """Fails every waiting request, once."""
        if self.cause_of_death is not None:
            return
        self.cause_of_death = cause
        if self.snapshot is not None:
            self.snapshot = msgspec.structs.replace(self.snapshot, num_running=0, num_waiting=0, cache_usage=0.0)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(cause)
            return
        logger.error("the engine failed: %s", cause)
        failure = EngineDeadError("the engine failed: the request cannot be finished")
        failure.__cause__ = cause
        self.fail(failure)
        self.on_death()

    def fail(self, error: OutriderError) -> None:
        """Ends everything in flight with an error."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        generations = {generation for generation, _ in self._requests.values()}
        self._end(list(self._requests), FinishReason.ABORT)
        self._requests.clear()
        for generation in generations:
            generation.fail(error)
