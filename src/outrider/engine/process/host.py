"""The engine in a process of its own, so that nothing a server does with text or sockets keeps a step waiting."""

from __future__ import annotations

import contextlib
import gc
import logging
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from typing import Literal

import msgspec
import zmq

from outrider.core.output import FinishReason
from outrider.core.sampling import SamplingParams
from outrider.engine.build import build_engine
from outrider.engine.engine import Engine, EngineStats
from outrider.engine.process.logs import write_logs
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
    WatchedRates,
)
from outrider.errors import EngineDeadError, InputError, OutriderError, class_name
from outrider.options import EngineOptions

logger = logging.getLogger("outrider")

SNAPSHOT_SECONDS = 0.1
"""Between two snapshots while there is work."""

ALIVE_SECONDS = 0.5
"""Between two signs of life of an engine that has nothing to do."""

WARM_UP_TOKENS = 8


def run(options: EngineOptions, address: str, log_format: str = "text") -> None:
    """The process's whole life: build the engine, report it, serve until `Quit` comes or the parent is gone.

    An error is sent to the client; the exit code is 1 then.
    """
    for name in (signal.SIGINT, signal.SIGTERM):  # both may reach the whole group: it is the server that decides
        signal.signal(name, signal.SIG_IGN)
    write_logs(log_format)
    context = zmq.Context()
    socket = connected(context, address)
    try:
        engine = build(options, socket)
        with contextlib.closing(engine):
            _warm_up(engine)
            # What is here stays. A full collection would look through all of it in the middle of a step.
            gc.collect()
            gc.freeze()
            EngineProcess(engine, socket).serve()
    except Exception as error:
        if isinstance(error, EngineDeadError) or not isinstance(error, OutriderError):
            logger.exception("the engine failed")
        socket.send(msgspec.msgpack.encode(Failed(class_name(error), str(error) or repr(error))))
        raise SystemExit(1) from error
    finally:
        context.destroy(linger=1000)


def connected(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """The engine's end of the socket. It drops nothing and blocks no step: the server bounds what is in flight."""
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.connect(address)
    return socket


def build(options: EngineOptions, socket: zmq.Socket[bytes]) -> Engine:
    """The engine. Its progress is sent to the client."""

    def report(what: Literal["weights", "programs"]) -> Callable[[int, int], None]:
        return lambda done, total: socket.send(msgspec.msgpack.encode(Building(what, done, total)))

    return build_engine(options, report("weights"), report("programs"))


def _warm_up(engine: Engine) -> None:
    """A few tokens first: kernels are compiled, once a machine, or read from their cache, and pages touched.

    One text is greedy, one is sampled in every way there is.
    """
    prompt = [0] * min(4, engine.resolved.runner.sizes.max_model_len - 1)
    greedy = SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
    sampled = replace(greedy, temperature=1.0, top_p=0.9, top_k=5, min_p=0.01)
    for number, params in enumerate((greedy, sampled)):
        engine.add(f"warm-up-{number}", prompt, params)
    while engine.has_work:
        engine.step()


@dataclass(slots=True)
class EngineProcess:
    """The loop around `Engine.step` that takes what came in between two steps and sends what they brought."""

    engine: Engine
    socket: zmq.Socket[bytes]

    def serve(self) -> None:
        """Until `Quit` comes, or the parent is gone. Raises EngineDeadError if a step fails."""
        start = self.engine.stats()
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._send(Ready(_facts(self.engine), self._snapshot(start), pickle.dumps(self.engine.choice)))
        last_sent = 0.0
        while True:
            was_busy = self.engine.has_work
            for message in self._received(0 if was_busy else ALIVE_SECONDS):
                if not self._take(decoder.decode(message)):
                    return
            deltas = self._step() if self.engine.has_work else []
            now, busy = time.monotonic(), self.engine.has_work
            since = now - last_sent
            fell_idle = (was_busy or bool(deltas)) and not busy
            due = fell_idle or since >= (SNAPSHOT_SECONDS if busy else ALIVE_SECONDS)
            if due:
                last_sent = now
            if due or deltas:
                self._send(Progress(deltas, self._snapshot(start) if due else None))

    def _received(self, seconds: float) -> Iterator[bytes]:
        """What has come; waits so long for the first. Ends the process if the parent is gone."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        parent = parent_process()
        if parent is not None:
            poller.register(parent.sentinel, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(int(seconds * 1000)))
            if parent is not None and parent.sentinel in ready:
                raise SystemExit(1)
            if self.socket not in ready:
                return
            yield self.socket.recv()
            seconds = 0

    def _take(self, message: ToEngine) -> bool:
        """Does what a message asks; False if that is to quit."""
        if isinstance(message, Quit):
            return False
        if isinstance(message, End):
            for request_id in message.ids:
                self.engine.finish(request_id, message.reason)
        elif isinstance(message, AskWatchdog):
            self._send(Watchdog(message.number, pickle.dumps(self.engine.watchdog.state())))
        else:
            self._add(message)
        return True

    def _add(self, message: Add) -> None:
        added: list[Prompt] = []
        try:
            for prompt in message.prompts:
                self.engine.add(prompt.id, prompt.tokens, prompt.params(), prompt.max_drafts)
                added.append(prompt)
        except InputError as error:
            for prompt in added:
                self.engine.finish(prompt.id, FinishReason.ABORT)
            self._send(Refused(message.number, class_name(error), str(error), error.field))
        else:
            self._send(Taken(message.number))

    def _step(self) -> list[Delta]:
        deltas = []
        for gained, request in self.engine.step():
            drafted, rounds = request.acceptance.counts
            deltas.append(Delta(*gained, request.num_cached, drafted, rounds, request.acceptance.drafting_ended))
        return deltas

    def _snapshot(self, start: EngineStats) -> Snapshot:
        stats = self.engine.stats()
        watched = tuple(
            WatchedRates(one.temperature, one.expected.rates, one.measured.rates, bool(one.departures))
            for one in self.engine.watchdog.state().watched
        )
        return Snapshot(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            cache_usage=stats.cache_usage,
            prefix_queries=stats.prefix_queries - start.prefix_queries,
            prefix_hits=stats.prefix_hits - start.prefix_hits,
            num_preemptions=stats.num_preemptions - start.num_preemptions,
            num_steps=stats.num_steps - start.num_steps,
            acceptance=stats.acceptance.since(start.acceptance),
            watched=watched,
            drafter_failures=0 if stats.drafter is None else stats.drafter.num_failures,
            drafting_stopped=stats.drafter is not None and stats.drafter.stopped,
        )

    def _send(self, message: FromEngine) -> None:
        self.socket.send(msgspec.msgpack.encode(message))


def _facts(engine: Engine) -> Facts:
    resolved, choice = engine.resolved, engine.choice
    runner = resolved.runner
    verdict = choice.to_dict()
    return Facts(
        max_model_len=runner.sizes.max_model_len,
        max_num_seqs=runner.sizes.max_num_seqs,
        vocab_size=runner.model_config.vocab_size,
        eos_token_ids=list(resolved.eos_token_ids),
        num_blocks=runner.memory.num_blocks,
        block_size=runner.sizes.block_size,
        method=resolved.method,
        num_speculative_tokens=runner.draft_options.num_speculative_tokens,
        verifier=runner.verifier.name,
        faithful=runner.verifier.faithful,
        dtype=str(runner.dtype).removeprefix("torch."),
        device=str(runner.device),
        runner=verdict["runner"],
        forced=verdict["forced"],
        passed_over=verdict["passed_over"],
        sampling_defaults=dict(resolved.sampling_defaults),
    )
