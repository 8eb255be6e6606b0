"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

from outrider.server.options import ServerOptions
from outrider.server.serve import _bound


def test_what_is_written_is_sent_at_once() -> None:
    """Else a small answer waits for the client's delayed acknowledgement of its head: 40 ms a request."""
    seen = []

    async def main() -> None:
        met = asyncio.Event()

        async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            met.set()

        listener = _bound(ServerOptions(port=0))
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            await met.wait()
            writer.close()

    asyncio.run(main())
    assert seen and seen[0] != 0
