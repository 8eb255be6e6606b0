"""Answers that stop working when the client has gone, and errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outrider.errors import (
    DeadlineError,
    EngineDeadError,
    EngineRestartingError,
    InputError,
    LogitsError,
    OverloadError,
)
from outrider.server.http.deadline import Deadline

logger = logging.getLogger("outrider")

JSON = "application/json"
GONE = 499
"""For the log: the client did not wait for an answer."""

MAX_MESSAGE_LENGTH = 500
"""Characters of an error's message: it may quote what the client sent, which may be of any length."""

LAST_SECONDS = 5.0
"""Time for a client that reads slowly to take the event that a stream failed with."""

_TYPES = {408: "timeout_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

Made = TypeVar("Made")


class ClientGoneError(HTTPException):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client has gone")


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, encoded by msgspec."""
    return Response(msgspec.json.encode(content), status, headers, JSON)


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def error_record(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    default = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": _TYPES.get(status, default), "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, record and headers of what went wrong. What is not the client's fault is logged, and not sent."""
    if isinstance(error, InputError):
        said = str(error)
        said = said if len(said) <= MAX_MESSAGE_LENGTH else f"{said[: MAX_MESSAGE_LENGTH - 3]}..."
        return 400, error_record(400, said, error.field), {}
    if isinstance(error, OverloadError):
        return 429, error_record(429, str(error), code="overloaded"), {"retry-after": str(error.retry_after)}
    if isinstance(error, DeadlineError):
        return 408, error_record(408, str(error), code="request_timeout"), {}
    if isinstance(error, LogitsError):
        return 500, error_record(500, str(error), code="invalid_logits"), {}
    if isinstance(error, EngineRestartingError):
        headers = {"retry-after": str(error.retry_after)}
        return 503, error_record(503, str(error), code="engine_restarting"), headers
    if isinstance(error, EngineDeadError):
        return 503, error_record(503, str(error), code="engine_dead"), {}
    if isinstance(error, ClientDisconnect):
        error = ClientGoneError()
    if isinstance(error, HTTPException):
        code = {404: "not_found", 401: "invalid_api_key", 413: "body_too_large"}.get(error.status_code)
        headers = dict(error.headers or {})
        return error.status_code, error_record(error.status_code, error.detail, code=code), headers
    logger.error("a request failed", exc_info=error)
    return 500, error_record(500, "the server failed; its log says more"), {}


def error_response(error: Exception) -> Response:
    """An answer that says what went wrong."""
    status, record, headers = describe(error)
    return json_response(record, status, headers)


def _error_event(error: Exception) -> bytes:
    return event(describe(error)[1])


async def _gone(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: asyncio.Task[Made], receive: Receive) -> Made:
    """What the work gives, unless the client goes first: then the work is cancelled. Raises ClientGoneError then."""
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGoneError
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Made] | asyncio.Task[Made]) -> Made:
    """What the work gives, unless the client disconnects first: then it is cancelled, and ClientGoneError raised."""
    return await _first(asyncio.ensure_future(work), request.receive)


async def in_time(deadline: Deadline | None, work: Awaitable[Response]) -> Response:
    """The answer, cut off at the deadline: DeadlineError then, or in a stream an event that holds it."""
    if deadline is None:
        return await work
    async with deadline.kept():
        response = await work
    if isinstance(response, EventStream):
        response.deadline = deadline
    return response


class EventStream(Response):
    """Server-sent events. They end when the client has gone; `closed` is called whatever happens."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        closed: Callable[[], None],
        failed: Callable[[Exception], bytes] | None = None,
    ) -> None:
        """`failed`: the last event, if something goes wrong; left out, the error as OpenAI writes one."""
        self._failed = failed or _error_event
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._closed = events, closed
        self.deadline: Deadline | None = None
        """When the last event must have been sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them as they come. An error becomes the last event: the status has been sent by then."""
        try:
            await _first(asyncio.ensure_future(self._send(send)), receive)
        except ClientGoneError:
            pass
        finally:
            self._closed()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with self.deadline.kept() if self.deadline is not None else contextlib.nullcontext():
                async for chunk in self._events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            self._closed()  # first: the client may take its time to read the event
            last = self._failed(error)
        else:
            last = b""
        with contextlib.suppress(TimeoutError):  # a client that reads nothing gets no event: the connection is closed
            async with asyncio.timeout(LAST_SECONDS if last else None):
                await send({"type": "http.response.body", "body": last, "more_body": False})
