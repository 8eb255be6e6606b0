"""What every request passes first and last: an id, a line in the log, a count, and a span if there is tracing."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.engine.process.logs import FIELDS
from outrider.server.http.responses import GONE, error_response
from outrider.server.http.tracing import Tracing
from outrider.server.paths import POLLED_PATHS

logger = logging.getLogger("outrider.access")

REQUEST_ID = "x-request-id"
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

Counted = Callable[[str, str, int], None]
"""Called with method, route and status of each request that was answered."""


def route_path(scope: Scope) -> str:
    """The path without the one under which a proxy shows the server: what routes are found by."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path == root:
        return "/"
    return path[len(root) :] if root and path.startswith(root + "/") else path


class AccessLogMiddleware:
    """ASGI middleware. It never looks into a body, and what it logs holds nothing of one."""

    def __init__(self, app: ASGIApp, counted: Counted, tracing: Tracing | None, root_path: str = "") -> None:
        """`root_path`: under which a proxy shows the server, whether or not it takes it off."""
        self._app, self._counted, self._tracing, self._root_path = app, counted, tracing, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, and logs it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status, begun = time.monotonic(), GONE, False

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        tracing = self._tracing
        span = tracing.begin(scope["method"], route_path(scope), headers) if tracing is not None else None
        try:
            with tracing.current(span) if tracing is not None and span is not None else contextlib.nullcontext():
                await self._app(scope, receive, answer)
        except Exception as error:
            if begun:
                raise
            await error_response(error)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._counted(scope["method"], route, status)
            if tracing is not None and span is not None:
                tracing.end(span, scope["method"], route, status, request_id)
            fields = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(time.monotonic() - start, 3),
                "request_id": request_id,
            }
            line = "method={method} route={route} status={status} seconds={seconds:.3f} request_id={request_id}"
            level = logging.DEBUG if route in POLLED_PATHS and status < 400 else logging.INFO
            logger.log(level, "%s", line.format(**fields), extra={FIELDS: fields})
