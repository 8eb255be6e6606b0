"""The playground: its files, which a browser may keep but must ask about, and the state that it polls."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from outrider import __version__
from outrider.server.http.responses import json_response
from outrider.server.paths import PLAYGROUND
from outrider.server.service import Service

DIRECTORY = Path(__file__).parent / "static"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked about each time: the answer is 304 until the file changes
}


def add_files(app: FastAPI) -> None:
    """Shows each file at its path. They are read once: nothing that a client sends reaches the file system."""
    for path, name in PLAYGROUND.items():
        _add_file(app, path, (DIRECTORY / name).read_bytes(), MEDIA_TYPES[Path(name).suffix])


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    async def show(request: Request) -> Response:
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    app.add_api_route(path, show, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)


async def state(service: Service, request: Request) -> Response:
    """What is served, what it does at this moment, and how its drafts fare beside what is on record."""
    snapshot = service.client.snapshot
    assert snapshot is not None, "requests are taken once the engine is ready"
    return json_response(
        {
            "version": __version__,
            "status": service.status,
            "model": service.model_record(),
            "running": snapshot.num_running,
            "waiting": snapshot.num_waiting,
            "cache_usage": snapshot.cache_usage,
            "acceptance": snapshot.acceptance.to_dict(),
            "watched": [
                {
                    "temperature": one.temperature,
                    "expected": one.expected,
                    "measured": one.measured,
                    "departed": one.departed,
                }
                for one in snapshot.watched
            ],
        }
    )
