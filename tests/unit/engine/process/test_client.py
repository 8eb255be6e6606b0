"""The client of an engine's process, where no process is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from outrider.core.output import AcceptanceTally
from outrider.engine.process.client import EngineClient
from outrider.engine.process.messages import Building, Progress, Snapshot
from outrider.errors import EngineDeadError, EngineRestartingError, OptionError
from outrider.options import EngineOptions


async def hangs() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise OSError("no process can be made")


async def refuses() -> None:
    raise OptionError("the model is gone")


@pytest.mark.parametrize(
    ("start", "said"),
    [(hangs, "not ready after 0 seconds"), (fails, "no process can be made"), (refuses, "the model is gone")],
)
def test_a_restart_that_fails_leaves_a_dead_engine(start: Callable[[], Awaitable[None]], said: str) -> None:
    async def main() -> None:
        client: Any = EngineClient(EngineOptions(), timeout=0.05)
        try:
            client.restarting, client.start = True, start
            with pytest.raises(EngineRestartingError) as restarting:
                client.check_alive()
            assert restarting.value.retry_after == 1
            with pytest.raises(EngineDeadError, match=said):
                await client.restart()
            assert client.restarting and not client.alive
            client.restarting = False
            assert not client.alive
            with pytest.raises(EngineDeadError, match="runs no more requests"):
                client.check_alive()
        finally:
            await client.close()

    asyncio.run(main())


SNAPSHOT = Snapshot(3, 4, 0.5, 0, 0, 0, 9, AcceptanceTally().report(), ())


def test_a_message_that_is_none_kills_the_engine_rather_than_who_listens() -> None:
    class Wire:
        def __init__(self) -> None:
            self.messages = [b"\xff", b""]

        async def recv(self) -> bytes:
            return self.messages.pop() if self.messages else await asyncio.Event().wait() or b""

    async def main() -> None:
        client: Any = EngineClient(EngineOptions(), timeout=0.05)
        try:
            listening = asyncio.create_task(client._listen(Wire()))
            client.snapshot, died = SNAPSHOT, asyncio.Event()
            client.on_death = died.set
            await asyncio.wait_for(died.wait(), 10)
            assert "could not take in" in str(client.cause_of_death) and not listening.done()
            assert (client.snapshot.num_running, client.snapshot.num_steps) == (0, 9)
            client._take(Progress([], SNAPSHOT))  # sent before it died
            assert client.snapshot.num_running == 0
            listening.cancel()
        finally:
            await client.close()

    asyncio.run(main())


def test_who_started_the_engine_is_told_how_far_it_is_and_who_did_not_ask_is_not() -> None:
    async def main() -> None:
        client: Any = EngineClient(EngineOptions(), timeout=0.05)
        loaded: list[tuple[int, int]] = []
        recorded: list[tuple[int, int]] = []
        try:
            for counted in ((lambda *n: loaded.append(n), lambda *n: recorded.append(n)), (None, None)):
                starting = asyncio.create_task(client.start(*counted))
                while client._process is None:
                    await asyncio.sleep(0)
                client._take(Building("weights", 5, 9))
                client._take(Building("programs", 1, 4))
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                await client._clear(0.0)
                client._process = None
            assert (loaded, recorded) == ([(5, 9)], [(1, 4)])
        finally:
            await client.close()

    asyncio.run(main())


def test_a_restart_that_cannot_clear_away_the_old_engine_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client: Any = EngineClient(EngineOptions(), timeout=0.05)
        clear = client._clear

        async def wedged(_: float) -> None:
            raise RuntimeError("no way")

        monkeypatch.setattr(client, "_clear", wedged)
        with pytest.raises(EngineDeadError, match="no way"):
            await client.restart()
        monkeypatch.setattr(client, "_clear", clear)
        await client.close()

    asyncio.run(main())
