"""A served engine without processes and sockets: the real application, tokenizer and engine on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from outrider.config import EngineOptions
from outrider.engine.build import build_engine
from outrider.engine.process.client import EngineClient
from outrider.engine.process.host import EngineProcess, _facts
from outrider.engine.process.messages import Facts, Progress, ToEngine
from outrider.server.app import build
from outrider.server.http.metrics import Metrics
from outrider.server.service import Service
from outrider.server.tokenizer_service import TokenizerService

MAX_BODY_BYTES = 1 << 18


class _Wire:
    """One direction of the socket: what is sent is kept until the other end takes it."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.came = asyncio.Event()

    def send(self, message: bytes) -> None:
        self.sent.append(message)
        self.came.set()

    def taken(self) -> list[bytes]:
        taken, self.sent = self.sent, []
        self.came.clear()
        return taken

    def close(self, linger: int = 0) -> None:
        self.sent.clear()


class EngineInProcess(EngineClient):
    """A client whose engine runs on the same event loop. Both ends encode and decode every message."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options, timeout=60.0)
        self.engine = build_engine(options)
        self._to_engine, self._to_client = _Wire(), _Wire()
        self._socket: Any = self._to_engine
        wire: Any = self._to_client
        self._host = EngineProcess(self.engine, wire)

    async def start(self, *_: Any) -> Facts:
        """As `EngineClient.start`."""
        self._first = self.engine.stats()
        self.snapshot, self.choice = self._host._snapshot(self._first), self.engine.choice
        self._tasks.append(asyncio.get_running_loop().create_task(self._run()))
        return _facts(self.engine)

    async def _run(self) -> None:
        """The loop of `EngineProcess.serve`, which gives way to the server after each step."""
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        try:
            while True:
                if not self.engine.has_work:
                    await self._to_engine.came.wait()
                for message in self._to_engine.taken():
                    self._host._take(decoder.decode(message))
                deltas = self._host._step() if self.engine.has_work else []
                idle = not self.engine.has_work
                self._host._send(Progress(deltas, self._host._snapshot(self._first) if idle else None))
                for message in self._to_client.taken():
                    self._take(self._decoder.decode(message))
                await asyncio.sleep(0)
        except Exception as error:
            self._die(error)  # type: ignore[arg-type]
            raise

    async def close(self) -> None:
        """As `EngineClient.close`."""
        await super().close()
        self.engine.close()


@dataclass(slots=True)
class Served:
    """An application and what answers it."""

    app: ASGIApp
    service: Service
    client: EngineInProcess

    def check_idle(self) -> None:
        """AssertionError where anything of a request is left."""
        engine, service = self.client.engine, self.service
        assert self.client.alive, self.client.cause_of_death
        assert not engine.has_work and self.client.num_in_flight == 0 and service._num_arriving == 0
        assert not self.client._answers, "a request waits for an answer"
        engine._scheduler.check_idle()
        assert engine.stats().cache_usage == 0.0


@contextlib.asynccontextmanager
async def served(directory: Path, *parsers: str | None, max_waiting: int = 64, **options: Any) -> AsyncIterator[Served]:
    """The application over an engine of these options. `parsers`: of tool calls and of reasoning."""
    client = EngineInProcess(EngineOptions(model=str(directory), **options))
    tokenizer = TokenizerService(directory, *parsers)
    try:
        facts = await client.start()
        service = Service(client, facts, tokenizer, Metrics(client, facts, "tiny"), "tiny", max_waiting)
        yield Served(build(service, [], MAX_BODY_BYTES, ""), service, client)
    finally:
        await client.close()
        tokenizer.close()


@dataclass(frozen=True, slots=True)
class Sent:
    """One request, and when its client leaves."""

    method: str
    path: str
    body: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    cuts: Sequence[int] = ()  # of the body, where it comes in pieces
    stays: int | None = None  # messages of the answer after which the client goes; None: to the end


@dataclass(slots=True)
class Reply:
    """What came of a request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


async def ask(app: ASGIApp, sent: Sent) -> Reply:
    """Sends a request to the application as a server of ASGI would."""
    reply, gone = Reply(), asyncio.Event()
    edges = [0, *sent.cuts, len(sent.body)]
    chunks = [sent.body[start:stop] for start, stop in itertools.pairwise(edges)]
    came = 0
    if sent.stays == 0:
        gone.set()

    async def receive() -> Message:
        if chunks and not gone.is_set():
            body = chunks.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(chunks)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal came
        came += 1
        if message["type"] == "http.response.start":
            assert not reply.status, "two answers"
            reply.status = message["status"]
            reply.headers = {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            assert reply.status and not reply.is_whole, "a body before its start, or after its end"
            reply.pieces.append(message.get("body", b""))
            reply.is_whole = not message.get("more_body", False)
        if reply.is_whole or (sent.stays is not None and came >= sent.stays):
            gone.set()
        await asyncio.sleep(0)

    path, _, query = sent.path.partition("?")
    headers = [(b"host", b"tiny"), (b"content-type", b"application/json"), *sent.headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return reply
