"""The client of an engine's process, where no process is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from outrider.config import EngineOptions
from outrider.errors import EngineDeadError, EngineRestartingError, OptionError
from outrider.server.client import EngineClient


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
            with pytest.raises(EngineDeadError, match="going down"):
                client.check_alive()
        finally:
            await client.close()

    asyncio.run(main())
