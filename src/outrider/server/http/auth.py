"""What a request must pass before a route sees it: the API key, and the size of its body, alone and with all others."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.errors import OverloadError
from outrider.server.http.access_log import route_path
from outrider.server.http.responses import error_response
from outrider.server.paths import OPEN_PATHS

BODIES_HELD = 64
"""Bodies of the largest size that are held at once, or more that are smaller: each until its request is answered."""

RETRY_SECONDS = 1
"""Before a request is worth sending again when too many bodies are held."""


@dataclass(slots=True)
class _Body:
    num_bytes: int = 0  # that have come


class AuthMiddleware:
    """ASGI middleware. It never looks into a body."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int) -> None:
        self._app = app
        self._keys = [sha256(key.encode()).digest() for key in keys]
        self._max_body_bytes = max_body_bytes
        self._num_held = 0  # bytes of the bodies of all requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers in the application's stead."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(route_path(scope), Headers(scope=scope))
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        body = _Body()
        try:
            await self._app(scope, self._limited(receive, body), send)
        finally:
            self._num_held -= body.num_bytes

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

    def _limited(self, receive: Receive, body: _Body) -> Receive:
        """The same, but a body of no stated length is refused at the limit too, and any while too much is held."""

        async def limited() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                if body.num_bytes + size > self._max_body_bytes:
                    raise self._too_large()
                if self._num_held + size > BODIES_HELD * self._max_body_bytes:
                    raise OverloadError("the server holds as many bodies as it may: try again later", RETRY_SECONDS)
                body.num_bytes += size
                self._num_held += size
            return message

        return limited
