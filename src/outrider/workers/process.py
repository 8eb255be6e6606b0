"""A worker in a process of its own: plans go there over a socket, results come back."""

from __future__ import annotations

import io
import logging
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import FunctionType
from typing import IO, Any

import torch

from outrider.core.plan import StepPlan, StepResult
from outrider.core.turns import watch_forks
from outrider.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineForkedError,
    OptionError,
    OutriderError,
    rebuilt,
)
from outrider.parallel.mesh import Mesh
from outrider.runner.base import Runner, RunnerConfig
from outrider.workers.base import WorkerStats
from outrider.workers.messages import Ask, Build, Built, Call, Failed, Progress, Quit, Reply

QUIT_SECONDS = 10.0
"""Time for the process to end by itself after `Quit`."""

MAX_LAST_LINES = 40
"""Lines of the process's stderr that are kept for the message about its death."""

_PROGRAM = "import sys; sys.path[:] = {path!r}; from outrider.workers.process_main import main; main({descriptor})"
"""What the process runs. It gets this process's path, so that it finds a user's own drafter."""


class ProcessWorker:
    """Hosts one runner in another process.

    Threads do the sending and receiving, since an interrupt (Ctrl-C) in the midst of a message would tear it.
    """

    def __init__(self, runner: type[Runner], config: RunnerConfig, mesh: Mesh) -> None:
        """Starts the process and waits until the runner is built.

        Raises what building it raises, EngineDeadError if the process dies, and OptionError for a configuration that
        cannot be sent, such as a drafter that no module holds.
        """
        self.depth = runner.depth
        self._callbacks = {"progress": config.progress, "recording": config.recording}
        self._cause: OutriderError | None = None
        self._results: dict[int, StepResult] = {}
        self._num_asked = 0
        self._last_lines: deque[str] = deque(maxlen=MAX_LAST_LINES)
        self._inbox: SimpleQueue[object] = SimpleQueue()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        build = Build(
            runner,
            replace(config, progress=None, recording=None),
            mesh,
            torch.get_num_threads(),
            logging.getLogger("outrider").getEffectiveLevel(),
        )
        try:
            first = _pickled(build)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise OptionError(
                f"the configuration cannot be sent to a worker's process: {error}; define its parts in modules, or "
                "take distributed_executor_backend uni"
            ) from error
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path, descriptor=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # A group of its own, so that a terminal's Ctrl-C reaches the engine alone.
                process_group=0,
            )
        self._connection = connection = Connection(ours.detach())
        self._unusable: type[EngineClosedError | EngineForkedError] = EngineClosedError
        self._end = weakref.finalize(self, _kill, self._process, self._outbox)
        assert self._process.stderr is not None
        self._stderr = _thread(_forward, self._process.stderr, self._last_lines)
        self._receiver = _thread(_receive, connection, self._inbox)
        self._sender = _thread(_send, connection, self._outbox)
        watch_forks(self)
        self._outbox.put(first)
        try:
            while not isinstance(self._next(), Built):
                pass
        except BaseException:
            self._stop(0.0)
            raise

    def submit(self, plan: StepPlan) -> _ProcessPending:
        """Sends a plan; plans run in the order given. The death of the process is found when a result is read."""
        self._check_open()
        self._post(plan)
        return _ProcessPending(self, plan.step)

    def result(self, step: int) -> StepResult:
        """Waits for a step. Raises EngineDeadError if its process has failed or died."""
        while step not in self._results:
            message = self._next()
            if isinstance(message, StepResult):
                self._results[message.step] = message
        return self._results.pop(step)

    def reset(self) -> None:
        """Forgets every request, as after an interrupted step; results that are still in flight are dropped."""
        self._ask(Call.RESET)
        self._results.clear()

    def stats(self) -> WorkerStats:
        """As `Worker.stats`. Raises EngineDeadError if the process has failed or died."""
        stats: WorkerStats = self._ask(Call.STATS)
        return stats

    def close(self) -> None:
        """Ends the process, in its own time or by force. Idempotent."""
        self._stop(QUIT_SECONDS)

    def _check_open(self) -> None:
        if not self._end.alive:
            raise self._unusable

    def after_fork(self) -> None:
        """In a forked child: the process is the parent's, and must end with the parent."""
        self._unusable = EngineForkedError
        self._end.detach()
        self._connection.close()

    def _ask(self, call: Call) -> Any:
        self._check_open()
        self._num_asked += 1
        number = self._num_asked
        self._post(Ask(number, call))
        while True:
            message = self._next()
            if isinstance(message, StepResult):
                self._results[message.step] = message
            elif isinstance(message, Reply) and message.number == number:
                return message.value

    def _post(self, message: object) -> None:
        self._outbox.put(pickle.dumps(message))

    def _next(self) -> object:
        """The next message. Raises what the process failed with, or EngineDeadError if it died."""
        if self._cause is not None:
            raise self._cause
        message = self._inbox.get()
        if message is None:
            # An interrupt may come before the cause is kept: whoever asks again finds the end too.
            self._inbox.put(None)
            self._cause = EngineDeadError(self._death())
            raise self._cause
        if isinstance(message, Failed):
            self._cause = rebuilt(message.error, message.message, message.field)
            self._cause.add_note(f"in the worker's process:\n{message.traceback}")
            raise self._cause
        if isinstance(message, Progress):
            callback = self._callbacks[message.what]
            if callback is not None:
                callback(message.done, message.total)
        return message

    def _death(self) -> str:
        try:
            code = self._process.wait(QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._stderr.join(1.0)
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        said = "".join(f"\n  {line}" for line in self._last_lines)
        return f"the worker's process {how}" + (f"; its last words:{said}" if said else "")

    def _stop(self, seconds: float) -> None:
        """Ends the process after so many seconds by force, and the threads."""
        if not self._end.alive:
            return
        self._post(Quit())
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._end()
        for thread in (self._sender, self._receiver, self._stderr):
            thread.join(1.0)


class _ProcessPending:
    """A step that another process runs."""

    def __init__(self, worker: ProcessWorker, step: int) -> None:
        self._worker, self._step = worker, step
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Waits for the step."""
        if self._result is None:
            self._result = self._worker.result(self._step)
        return self._result


def _thread(target: Callable[..., None], *given: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=given, daemon=True)
    thread.start()
    return thread


def _kill(process: subprocess.Popen[bytes], outbox: SimpleQueue[bytes | None]) -> None:
    """Ends the process by force, if it has not ended, and the sender. It runs when the worker is forgotten too."""
    process.kill()
    process.wait()
    outbox.put(None)


def _send(connection: Connection, outbox: SimpleQueue[bytes | None]) -> None:
    while (message := outbox.get()) is not None:
        try:
            connection.send_bytes(message)
        except OSError:
            return  # the process is gone, which the receiver reports


def _receive(connection: Connection, inbox: SimpleQueue[object]) -> None:
    """Puts what comes into the inbox, and None at the end. Log records go to the log at once."""
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            inbox.put(None)
            return
        except Exception as error:  # of a class that is not to be had here
            inbox.put(Failed.of(error))
            return
        if isinstance(message, logging.LogRecord):
            _log(message)
        else:
            inbox.put(message)


def _log(record: logging.LogRecord) -> None:
    """Writes a record as this process's own. A filter or handler that raises may not end the thread."""
    logger = logging.getLogger(record.name)
    try:
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception:
        traceback.print_exc()


class _Pickler(pickle.Pickler):
    """Refuses what is defined in the script that runs, which a worker's process does not have."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType) and value.__module__ == "__main__":
            raise OptionError(
                f"{value.__qualname__} is defined in the script that runs (__main__), which a worker's process "
                "lacks: move it to a module of its own, or take distributed_executor_backend uni"
            )
        return NotImplemented


def _pickled(message: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(message)
    return buffer.getvalue()


def _forward(source: IO[bytes], last_lines: deque[str]) -> None:
    """Writes the process's stderr to ours, and keeps its end."""
    with source:
        for line in source:
            text = line.decode(errors="replace")
            last_lines.append(text.rstrip())
            print(text, end="", file=sys.stderr)
