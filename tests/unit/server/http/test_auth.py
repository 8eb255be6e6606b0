"""What every request passes first, without an engine behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from outrider.engine.process.logs import FIELDS
from outrider.server.http import auth
from outrider.server.http.access_log import AccessLogMiddleware
from outrider.server.http.auth import AuthMiddleware
from outrider.server.http.responses import error_response

LIMIT = 1000


def ask(
    method: str, path: str, keys: tuple[str, ...] = (), root_path: str = "", **given: Any
) -> tuple[httpx.Response, list[Any]]:
    """An answer of an application that echoes bodies, and what was counted."""
    app, counted = FastAPI(), []

    async def echo(request: Request) -> Response:
        try:
            return Response(await request.body())
        except Exception as error:
            return error_response(error)

    async def fault() -> Response:
        raise RuntimeError("of a test's")

    app.add_api_route("/fault", fault)
    for path_ in ("/health", "/metrics", "/version", "/v1/echo", "/tokenize", "/playground/state"):
        app.add_api_route(path_, echo, methods=["GET", "POST"])
    app.add_middleware(AuthMiddleware, keys=keys, max_body_bytes=LIMIT)
    app.add_middleware(AccessLogMiddleware, counted=lambda *one: counted.append(one), tracing=None, root_path=root_path)

    async def sent() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.request(method, path, **given)

    return asyncio.run(sent()), counted


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Bearer first2", "Basic first", "first", "Bearer é"])
def test_a_wrong_key_lets_nobody_in(header: str) -> None:
    headers = {"authorization": header.encode()} if header else {}
    answer, counted = ask("GET", "/v1/echo", ("first", "second"), headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer" and "first" not in answer.text
    assert counted == [("GET", "other", 401)]


@pytest.mark.parametrize("key", ["first", "second"])
def test_each_of_the_keys_lets_in(key: str) -> None:
    answer, counted = ask("GET", "/v1/echo", ("first", "second"), headers={"authorization": f"bearer {key}"})
    assert answer.status_code == 200 and counted == [("GET", "/v1/echo", 200)]


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version"])
def test_probes_need_no_key(path: str) -> None:
    assert ask("GET", path, ("first",))[0].status_code == 200


@pytest.mark.parametrize("path", ["/tokenize", "/openapi.json", "/nothing", "http://test//health", "/health/"])
def test_everything_else_does(path: str) -> None:
    assert ask("GET", path, ("first",))[0].status_code == 401


@pytest.mark.parametrize(
    ("path", "status"), [("/api/health", 200), ("/health", 200), ("/api/v1/echo", 401), ("/apihealth", 401)]
)
def test_probes_need_no_key_under_a_proxy_s_path_either(path: str, status: int) -> None:
    assert ask("GET", path, ("first",), "/api")[0].status_code == status


def test_a_proxy_s_path_itself_is_the_playground_s() -> None:
    assert ask("GET", "/api", ("first",), "/api")[0].status_code != 401


def test_a_fault_outside_the_routes_is_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    answer, counted = ask("GET", "/fault", headers={"x-request-id": "a-1"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert answer.headers["x-request-id"] == "a-1" and counted == [("GET", "/fault", 500)]
    assert "of a test's" in caplog.text


@pytest.mark.parametrize(("path", "keys", "logged"), [("/playground/state", (), 0), ("/playground/state", ("a",), 1)])
def test_what_is_polled_is_logged_only_if_it_goes_wrong(
    path: str, keys: tuple[str, ...], logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "outrider.access"):
        ask("GET", path, keys)
    assert len([one for one in caplog.records if one.name == "outrider.access"]) == logged


async def _chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 100):
        yield b"x" * 100


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 100, 413)])
def test_bodies_have_a_limit(size: int, status: int, stated: bool) -> None:
    answer, _ = ask("POST", "/v1/echo", content=b"x" * size if stated else _chunks(size))
    assert answer.status_code == status
    assert len(answer.content) == size if status == 200 else answer.json()["error"]["code"] == "body_too_large"


def test_bodies_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "BODIES_HELD", 2)
    app, ended = FastAPI(), asyncio.Event()

    async def wait(request: Request) -> Response:
        try:
            await request.body()
        except Exception as error:
            return error_response(error)
        await ended.wait()
        return Response()

    app.add_api_route("/wait", wait, methods=["POST"])
    app.add_middleware(AuthMiddleware, keys=(), max_body_bytes=LIMIT)

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            held = [asyncio.create_task(client.post("/wait", content=b"x" * LIMIT)) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = await client.post("/wait", content=b"x")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            ended.set()
            assert [answer.status_code for answer in await asyncio.gather(*held)] == [200, 200]
            assert (await client.post("/wait", content=b"x" * LIMIT)).status_code == 200

    asyncio.run(main())


def test_a_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "outrider.access"):
        answer, _ = ask("POST", "/v1/echo?q=hidden", content=b"secret", headers={"x-request-id": "a-1"})
    assert answer.headers["x-request-id"] == "a-1"
    (line,) = caplog.messages
    fields = getattr(caplog.records[0], FIELDS)
    assert fields.pop("seconds") >= 0
    assert fields == {"method": "POST", "route": "/v1/echo", "status": 200, "request_id": "a-1"}
    assert line.startswith("method=POST route=/v1/echo status=200 seconds=") and line.endswith("request_id=a-1")


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "a\tb", "é"])
def test_an_odd_request_id_is_replaced(sent: str) -> None:
    answer, _ = ask("GET", "/health", headers={"x-request-id": sent.encode()})
    assert answer.headers["x-request-id"] != sent and len(answer.headers["x-request-id"]) == 32
