"""What every request passes first: an id, the API key, the size of the body; and a line in the log when it is over."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.server.options import OPEN_PATHS
from outrider.server.responses import GONE, error_response

logger = logging.getLogger("outrider.access")

REQUEST_ID = "x-request-id"
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

Counted = Callable[[str, str, int], None]
"""Told method, route and status of each request that was answered."""


class Guard:
    """ASGI middleware. It never looks into a body, and what it logs holds nothing of one."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int, counted: Counted) -> None:
        self._app, self._counted = app, counted
        self._keys = [sha256(key.encode()).digest() for key in keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers in the application's stead."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is not None:
                await error_response(refusal)(scope, receive, answer)
            else:
                await self._app(scope, self._limited(receive), answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - start
            self._counted(scope["method"], route, status)
            logger.info(
                "method=%s route=%s status=%d seconds=%.3f request_id=%s",
                scope["method"],
                route,
                status,
                seconds,
                request_id,
            )

    def _refusal(self, path: str, headers: Headers) -> HTTPException | None:
        if self._keys and path not in OPEN_PATHS and not self._knows(headers.get("authorization", "")):
            said = "no valid API key: send it as Authorization: Bearer KEY"
            return HTTPException(401, said, {"www-authenticate": "Bearer"})
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _knows(self, authorization: str) -> bool:
        """Whether the header holds one of the keys. Takes as long for a wrong one as for a right one."""
        scheme, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return any(matches) and scheme.lower() == "bearer"

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes")

    def _limited(self, receive: Receive) -> Receive:
        """The same, but a body of no stated length is refused at the limit too."""
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise self._too_large()
            return message

        return limited
