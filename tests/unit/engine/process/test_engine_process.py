"""The engine's loop behind a wire, driven here in one process; and the records that cross."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from outrider import LLM, SamplingParams
from outrider.core.output import AcceptanceReport, FinishReason
from outrider.engine.build import build_engine
from outrider.engine.engine import Engine
from outrider.engine.process import host as process
from outrider.engine.process.host import EngineProcess, connected
from outrider.engine.process.messages import (
    Add,
    Building,
    End,
    FromEngine,
    Progress,
    Prompt,
    Quit,
    Ready,
    Refused,
    Taken,
    ToEngine,
)
from outrider.options import EngineOptions

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}


# A machine's first run compiles kernels, which takes a while: hence two minutes below.


class Wire:
    """The client's end."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.progress: list[Progress] = []

    def send(self, message: ToEngine) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> FromEngine:
        assert self.socket.poll(120_000), "the engine is silent"
        return msgspec.msgpack.decode(self.socket.recv(), type=FromEngine)

    def until(self, kind: type[Any]) -> Any:
        """The next message of a kind; progress on the way is kept."""
        while not isinstance(message := self.receive(), kind):
            assert isinstance(message, Progress)
            self.progress.append(message)
        return message

    def tokens(self, ids: set[str]) -> dict[str, list[int]]:
        """What each request gains until these have ended."""
        found: dict[str, list[int]] = defaultdict(list)
        while ids:
            for delta in self.until(Progress).deltas:
                found[delta.id] += delta.tokens
                if delta.finish_reason is not None:
                    ids = ids - {delta.id}
        return found


@pytest.fixture
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture
def wire(path: Path, tmp_path: Path) -> Iterator[Wire]:
    engine = build_engine(EngineOptions(model=str(path), speculative_config=NGRAM))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    address = f"ipc://{tmp_path}/w"
    socket.bind(address)
    loop = EngineProcess(engine, connected(context, address))
    thread = threading.Thread(target=loop.serve)
    thread.start()
    wire = Wire(socket)
    try:
        assert isinstance(wire.receive(), Ready)
        yield wire
    finally:
        wire.send(Quit())
        thread.join(120)
        context.destroy(linger=0)
    assert not thread.is_alive()
    assert not engine.has_work
    engine._scheduler.check_idle()


def test_the_client_is_told_of_weights_and_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    def recording(options: EngineOptions, progress: Any, recorded: Any) -> Engine:
        """Records, where there is nothing to record programs of."""
        engine = build_engine(options, progress, recorded)
        recorded(1, 2)
        recorded(2, 2)
        return engine

    monkeypatch.setattr(process, "build_engine", recording)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    address = f"ipc://{tmp_path}/w"
    socket.bind(address)
    engine = process.build(EngineOptions(model=str(path)), connected(context, address))
    told: list[Any] = []
    while not told or told[-1] != Building("programs", 2, 2):
        told.append(Wire(socket).receive())
    context.destroy(linger=0)
    weights = told[:-2]
    assert told[-2] == Building("programs", 1, 2) and {message.what for message in weights} == {"weights"}
    assert [message.done for message in weights] == sorted({message.done for message in weights}) and len(weights) > 2
    assert weights[-1].done == weights[-1].total == engine.resolved.runner.memory.weights
    engine.close()


def prompt(name: str, tokens: list[int], max_drafts: int | None = None, **sampling: Any) -> Prompt:
    return Prompt(name, tokens, asdict(SamplingParams(**sampling)), max_drafts)


def test_tokens_are_the_offline_api_s(wire: Wire, path: Path) -> None:
    asked = [([1, 2, 3], {"seed": 5, "max_tokens": 20}), ([4, 5] * 6, {"temperature": 0.0, "max_tokens": 30})]
    wire.send(Add(3, [prompt(str(n), ids, **sampling) for n, (ids, sampling) in enumerate(asked)]))
    assert wire.until(Taken).number == 3
    found = wire.tokens({"0", "1"})
    with LLM(str(path)) as llm:
        for n, (ids, sampling) in enumerate(asked):
            assert found[str(n)] == llm.generate([ids], SamplingParams(**sampling))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("wrong", "error", "field"),
    [
        (prompt("b", [999]), "PromptError", None),
        (prompt("b", []), "PromptError", None),
        (prompt("b", [1], stop_token_ids=[999]), "SamplingError", "stop_token_ids"),
        (Prompt("b", [1], {"temperature": -1.0}, None), "SamplingError", "temperature"),
        (prompt("a", [1]), "InputError", None),
    ],
)
def test_all_prompts_or_none(wire: Wire, wrong: Prompt, error: str, field: str | None) -> None:
    wire.send(Add(1, [prompt("a", [1], max_tokens=200, ignore_eos=True), wrong]))
    refused = wire.until(Refused)
    assert (refused.number, refused.error, refused.field) == (1, error, field) and refused.message
    wire.send(Add(2, [prompt("a", [1], max_tokens=3)]))
    assert wire.until(Taken).number == 2, "the id is free again"
    assert len(wire.tokens({"a"})["a"]) == 3


def test_ended_before_the_next_step(wire: Wire) -> None:
    wire.send(Add(1, [prompt("a", [1], max_tokens=250, ignore_eos=True), prompt("b", [2], max_tokens=8)]))
    wire.until(Taken)
    wire.send(End(["a", "unknown"], FinishReason.ABORT))
    assert len(wire.tokens({"b"})["a"]) < 100
    last = wire.until(Progress)
    while last.snapshot is None:
        last = wire.until(Progress)
    assert last.snapshot.num_running == last.snapshot.num_waiting == 0 == last.snapshot.cache_usage


def test_a_sign_of_life_without_work_and_counts_of_what_was_done(wire: Wire) -> None:
    first = wire.until(Progress)
    assert first.snapshot is not None and first.snapshot.num_steps == 0
    assert wire.until(Progress).snapshot == first.snapshot
    wire.send(Add(1, [prompt("a", [4, 5] * 6, temperature=0.0, max_tokens=30, ignore_eos=True)]))
    wire.until(Taken)
    progress = []
    while not (progress and any(delta.finish_reason for delta in progress[-1].deltas)):
        progress.append(wire.until(Progress))
    snapshot, last = progress[-1].snapshot, progress[-1].deltas[0]
    assert snapshot is not None, "it comes with the end of all work"
    assert snapshot.acceptance == last.tally().report() and snapshot.acceptance.drafts > 0
    assert snapshot.prefix_queries == 12 and snapshot.num_steps == len(progress)


def test_fewer_drafts_for_one_request(wire: Wire) -> None:
    asked = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    limits = {"all": None, "none": 0, "one": 1, "many": 99}
    wire.send(Add(1, [prompt(name, [4, 5] * 8, limit, **asked) for name, limit in limits.items()]))
    wire.until(Taken)
    last: dict[str, AcceptanceReport] = {}
    found: dict[str, list[int]] = {name: [] for name in limits}
    while any(len(tokens) < 40 for tokens in found.values()):
        for delta in wire.until(Progress).deltas:
            found[delta.id] += delta.tokens
            last[delta.id] = delta.tally().report()
    assert len({tuple(tokens) for tokens in found.values()}) == 1
    assert last["none"] == AcceptanceReport(0, 0, 0, (0, 0, 0), drafting_ended="the request asks for no drafts")
    assert last["one"].drafted == last["one"].drafts > 0
    assert last["all"] == last["many"] and last["all"].drafted > last["all"].drafts
