"""The worker's process: builds a runner, runs the plans that come, and sends back what they gave."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import logging.handlers
import os
import pickle
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any

import torch

from outrider.core.plan import StepPlan
from outrider.workers.local import LocalWorker
from outrider.workers.messages import Ask, Build, Built, Call, Failed, Progress, Quit, Reply


class Replies:
    """What is to be sent, in order."""

    def __init__(self) -> None:
        self.queue: Queue[Callable[[], object]] = Queue()
        """Functions that give it. One of them waits for its step."""
        self.failed = False
        """Whether a function raised: nothing more is sent, and no plan may run."""


def main(descriptor: int) -> None:
    """The process's whole life. It ends at `Quit`, when the runner fails, or when the engine's process is gone.

    `descriptor`: of this end of a socket pair. What the runner raises is sent; the exit code is 1 then.
    """
    faulthandler.enable()
    connection = Connection(descriptor)
    replies = Replies()
    threading.Thread(target=_end_with_the_engine, args=(descriptor,), daemon=True).start()
    threading.Thread(target=_send, args=(connection, replies), daemon=True).start()
    try:
        _serve(connection, replies)
    except _EngineGoneError:
        raise SystemExit(1) from None
    except Exception as error:
        replies.queue.put(partial(Failed.of, error))
        replies.queue.join()
        raise SystemExit(1) from None


class _EngineGoneError(Exception):
    """The engine's process has closed its end."""


def _receive(connection: Connection) -> Any:
    try:
        message = connection.recv_bytes()
    except EOFError:
        raise _EngineGoneError from None
    return pickle.loads(message)


def _serve(connection: Connection, replies: Replies) -> None:
    with contextlib.closing(_build(_receive(connection), replies)) as worker:
        replies.queue.put(Built)
        while True:
            message = _receive(connection)
            if isinstance(message, Quit):
                return
            if replies.failed:
                replies.queue.join()  # what failed may be on its way yet, and the process ends with this thread
                raise SystemExit(1)
            if isinstance(message, StepPlan):
                replies.queue.put(worker.submit(message).result)
            else:
                assert isinstance(message, Ask)
                # Results of earlier plans come first, so that no other thread reads the runner meanwhile.
                replies.queue.join()
                replies.queue.put(partial(Reply, message.number, _answer(worker, message.call)))


def _answer(worker: LocalWorker, call: Call) -> Any:
    return worker.stats() if call is Call.STATS else worker.reset()


def _build(message: Build, replies: Replies) -> LocalWorker:
    logging.getLogger().addHandler(_LogsSent(replies))
    logging.getLogger("outrider").setLevel(message.log_level)
    torch.set_num_threads(message.num_threads)

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, total: replies.queue.put(partial(Progress, what, done, total))

    config = replace(message.config, progress=report("progress"), recording=report("recording"))
    return LocalWorker(message.runner, config, message.mesh)


class _LogsSent(logging.handlers.QueueHandler):
    """Hands log records to the engine's process, which writes them as its own."""

    def __init__(self, replies: Replies) -> None:
        super().__init__(replies.queue)
        self._replies = replies

    def enqueue(self, record: logging.LogRecord) -> None:
        """Puts a record among the replies, with plain values only: others may not be had in the other process."""
        record.__dict__.update({name: _plain(value) for name, value in vars(record).items()})
        self._replies.queue.put(lambda: record)


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)


def _send(connection: Connection, replies: Replies) -> None:
    """Sends each reply once it is there. Waiting here leaves the main thread free to submit the next plan."""
    while True:
        make = replies.queue.get()
        try:
            if not replies.failed:
                connection.send_bytes(pickle.dumps(make()))
        except Exception as error:
            replies.failed = True
            with contextlib.suppress(OSError):  # the engine's process is gone
                connection.send_bytes(pickle.dumps(Failed.of(error)))
        finally:
            replies.queue.task_done()


def _end_with_the_engine(descriptor: int) -> None:
    """Ends this process, whatever it does, when the other end of the socket is closed."""
    poller = select.poll()
    poller.register(descriptor, 0)
    poller.poll()
    os._exit(1)
