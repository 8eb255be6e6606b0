"""The server's life where an engine's is short."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from fake_engine import FACTS
from outrider.errors import EngineDeadError
from outrider.options import EngineOptions
from outrider.server import serve
from outrider.server.options import ServerOptions


class ShortLived:
    """An engine that dies once it is ready, while the tokenizer is still loaded."""

    cause_of_death: Exception | None = None
    closed = False

    def __init__(self, *_: Any) -> None:
        pass

    async def start(self, *_: Any) -> Any:
        self.cause_of_death = EngineDeadError("it died young")
        return FACTS

    async def close(self) -> None:
        ShortLived.closed = True


def test_an_engine_that_dies_before_anybody_listens_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "EngineClient", ShortLived)
    monkeypatch.setattr(serve, "TokenizerService", lambda *_: None)

    async def nothing(*_: Any, **__: Any) -> None:
        pytest.fail("it listened")

    monkeypatch.setattr(serve._Server, "serve", nothing)
    options = ServerOptions(port=0)
    with serve._bound(options) as listener, pytest.raises(EngineDeadError, match="died young"):
        bars = contextlib.nullcontext((None, None))
        asyncio.run(serve._serve(EngineOptions(), Path(), options, (), listener, lambda _: None, lambda: bars))
    assert ShortLived.closed


def test_told_a_second_time_it_ends_at_once() -> None:
    failed: list[Exception] = []

    async def main() -> None:
        asked = asyncio.Event()

        async def hangs(_: Any, __: Any, ___: Any) -> None:
            asked.set()
            await asyncio.Event().wait()

        config = uvicorn.Config(hangs, lifespan="off", log_config=None, timeout_graceful_shutdown=600)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            server = serve._Server(config, lambda: None)
            client = SimpleNamespace(num_in_flight=1, fail=failed.append)
            service: Any = SimpleNamespace(draining=False, client=client)
            life = serve._Life(server, service, 600.0, restarts=False)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(asked.wait(), 20)
            life.drain()
            await asyncio.sleep(0)
            assert not failed
            life.drain()
            await asyncio.wait_for(serving, 20)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()

    asyncio.run(main())
    assert [type(error) for error in failed] == [EngineDeadError]
