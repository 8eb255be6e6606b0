"""What one connection may cost: how many bytes of a request, how long it may take to come, and to be read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from outrider.server.http.responses import JSON, error_record

logger = logging.getLogger("outrider.access")

MAX_HEADERS = 100
"""Header fields of a request, those after a body included."""

MAX_CHUNKS = 1 << 16
"""Parts that a body may come in: each takes time, however short it is."""

CHUNKING_BYTES = 1 << 20
"""Bytes that a request may have beyond its head and its body: what chunks are wrapped in."""

MAX_PIPELINED = 16
"""Requests of a connection that wait for the one before them."""

MIN_READ = 1 << 16
"""Bytes of an answer that a client must take in `send_timeout`, if so many wait for it."""

LINGER_SECONDS = 2.0
"""How long a refused client may go on sending: an answer is lost to clients whose connection ends under them."""

LINGER_BYTES = 64 << 20
"""How much it may send in that time."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of a server's connections, and those of them that wait for a request."""

    max_connections: int
    max_header_bytes: int
    max_body_bytes: int
    receive_timeout: float  # seconds
    send_timeout: float  # seconds
    waiting: dict[Connection, None] = field(default_factory=dict)  # in order of how long they have waited

    def protocol(self) -> Callable[..., asyncio.Protocol]:
        """What uvicorn makes its connections of."""
        return partial(Connection, self)


class Connection(HttpToolsProtocol):
    """uvicorn's, within limits.

    Beyond them the client gets an error in OpenAI's shape, if none of an answer has been sent, and the connection is
    closed. Where there are too many connections, the one that has waited longest for a request is closed.
    """

    def __init__(self, limits: ConnectionLimits, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._limits = limits
        self._in_head = True  # of the next request, of which nothing may have come yet
        self._num_bytes = 0  # of the request that is coming, those that were handed to the parser
        self._num_head = self._num_headers = self._num_chunks = 0
        self._refusal: tuple[int, str] | None = None
        self._is_refused = False  # what still comes is thrown away
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._num_unread = 0  # bytes of an answer when the client was last looked at

    # What comes.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Makes room for it, or refuses it."""
        super().connection_made(transport)
        limits = self._limits
        if len(self.connections) > limits.max_connections:
            oldest = next(iter(limits.waiting), None)
            if oldest is None:
                said = f"the server has the {limits.max_connections} connections that it may have: try again later"
                self._refuse(503, said)
                return
            oldest.transport.abort()
            limits.waiting.pop(oldest)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self._limits.waiting.pop(self, None)
        for timer in (self._receiving, self._sending):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses it, unless too much has come."""
        self._num_bytes += len(data)
        if self._is_refused and self._num_bytes > LINGER_BYTES:
            self.transport.abort()
        if self._is_refused or self.transport.is_closing():
            return
        if self._receiving is None:
            self._await_request()
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        limits = self._limits
        if self._in_head and self._num_bytes > limits.max_header_bytes:
            self._refuse(*self._head_too_large())
        elif self._num_bytes > limits.max_header_bytes + limits.max_body_bytes + CHUNKING_BYTES:
            self._refuse(413, f"the body is larger than {limits.max_body_bytes} bytes")

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(400, f"more than {MAX_PIPELINED} requests wait for an answer: wait for one")
        super().on_message_begin()
        self._in_head = True
        self._num_head = self._num_headers = self._num_chunks = 0
        if self._receiving is None:  # it follows another in the same data
            self._await_request()

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field."""
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            self._stop(431, f"the request has more than {MAX_HEADERS} header fields: send fewer")
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._num_chunks += 1
        if self._num_chunks > MAX_CHUNKS:
            self._stop(413, f"the body comes in more than {MAX_CHUNKS} chunks: send larger ones")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_head = True
        self._num_bytes = 0
        self._limits.waiting.pop(self, None)
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
        super().on_message_complete()

    def _count_head(self, num_bytes: int) -> None:
        self._num_head += num_bytes
        if self._num_head > self._limits.max_header_bytes:
            self._stop(*self._head_too_large())

    def _head_too_large(self) -> tuple[int, str]:
        return 431, f"the head of the request is larger than {self._limits.max_header_bytes} bytes: send less"

    def _await_request(self) -> None:
        """Gives the client its time to send a request."""
        self._limits.waiting.pop(self, None)
        self._limits.waiting[self] = None
        self._receiving = self.loop.call_later(self._limits.receive_timeout, self._came_too_late)

    def _came_too_late(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._await_request()
            return
        self._refuse(408, f"the request did not come within {self._limits.receive_timeout:g} seconds")

    # What goes.

    def pause_writing(self) -> None:
        """More waits for the client than is kept for it."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        if self._sending is not None and not self.transport.is_closing():
            self._sending.cancel()
            self._sending = None

    def on_response_complete(self) -> None:
        """An answer was written, and may wait for the client to take it."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reading()
        elif not self.pipeline and self._receiving is None:
            self._limits.waiting[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """No other request has come."""
        super().timeout_keep_alive_handler()
        self._watch_reading()

    def _watch_reading(self) -> None:
        """Cuts the connection if too little of what waits for the client is taken."""
        if self._sending is None:
            self._num_unread = self.transport.get_write_buffer_size()
            self._sending = self.loop.call_later(self._limits.send_timeout, self._was_read_slowly)

    def _was_read_slowly(self) -> None:
        self._sending = None
        num_unread = self.transport.get_write_buffer_size()
        if num_unread > max(0, self._num_unread - MIN_READ):
            logger.info("a connection is cut: its client has left %d bytes unread", num_unread)
            self.transport.abort()
        elif num_unread:
            self._watch_reading()

    # The end.

    def _stop(self, status: int, message: str) -> None:
        """Stops the parser, after which `send_400_response` is called."""
        self._refusal = (status, message)
        raise ConnectionError(message)

    def send_400_response(self, msg: str) -> None:
        """What was received is no HTTP, or is beyond a limit."""
        self._refuse(*(self._refusal or (400, "the request is not HTTP/1.1")))

    def _may_answer(self) -> bool:
        """Whether what is written next answers the request that is coming."""
        cycle = self.cycle
        if self.pipeline or cycle is None:
            return not self.pipeline
        return cycle.response_complete if self._in_head else not cycle.response_started

    def _refuse(self, status: int, message: str) -> None:
        """Closes the connection, with an error if the client waits for nothing else, and has asked for something."""
        logger.info("a connection is closed: status=%d %s", status, message)
        if not self._may_answer() or not (self._num_bytes or status == 503):
            self.transport.close()
            self._watch_reading()
            return
        body = msgspec.json.encode(error_record(status, message))
        lines = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"content-type: {JSON}",
            f"content-length: {len(body)}",
            "connection: close",
            *(["retry-after: 1"] if status == 503 else []),
        )
        self.transport.write("\r\n".join((*lines, "\r\n")).encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._is_refused, self._num_bytes = True, 0
        self.connections.discard(self)
        self._limits.waiting.pop(self, None)
        if self._receiving is not None:
            self._receiving.cancel()
        self._receiving = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        self.flow.resume_reading()
