"""The fuzz and the soak of benchmarks/, for seconds; and that they notice what they look for."""

from __future__ import annotations

import asyncio
import json
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from outrider.errors import DeadlineError
from outrider.server.http.deadline import Deadline
from servers import Server, serving

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for a script that is run from there
FUZZ, SOAK = (runpy.run_path(str(BENCHMARKS / f"serving_{name}.py")) for name in ("fuzz", "soak"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("scripts") / "log", *SOAK["SERVER_FLAGS"]) as server:
        yield server


def test_a_short_fuzz(server: Server) -> None:
    found = FUZZ["fuzz"](server.url, 300)
    assert found["faults"] == [] and found["requests"] == 300
    assert found["cache_usage_after"] == 0.0 and found["healthy_after"]
    for statuses in found["statuses"].values():
        assert statuses[400] > 0
    posts = {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"}
    assert posts <= found["answered_200"].keys(), "nothing got past the door of a path"
    assert server.metrics()["outrider:generation_tokens_total"] > 0, "nothing reached the engine"


def test_a_short_soak(server: Server) -> None:
    found = asyncio.run(SOAK["soak"](server.url, server.process.pid, 0.1, 8, 1, 2.0))
    assert not SOAK["failed"](found, 0.1), found
    assert found["faults"] == [] and found["pauses"] >= 1 and found["statuses"][200] > 0
    assert sum(found["sent"].values()) >= 8


ERROR = {"message": "no", "type": "x", "param": None, "code": None}
STREAM = {"content-type": "text/event-stream"}


def response_event(kind: str, message: str = "") -> bytes:
    """The last event of a stream of `/v1/responses`."""
    told = {"type": f"response.{kind}", "response": {"error": {"code": "server_error", "message": message}}}
    return f"event: response.{kind}\ndata: {json.dumps(told)}\n\n".encode()


def out_of_time() -> Exception:
    """What the server says of a request that ran out of time."""

    async def main() -> None:
        async with Deadline.after(0.0, lambda: None).kept():
            await asyncio.sleep(60.0)

    with pytest.raises(DeadlineError) as caught:
        asyncio.run(main())
    return caught.value


@pytest.mark.parametrize(
    ("status", "headers", "body", "fault"),
    [
        (500, {}, {"error": ERROR}, "status 500"),
        (503, {}, {"error": ERROR}, "status 503"),
        (400, {"x-request-id": ""}, {"error": ERROR}, None),
        (400, {"x-request-id": "drop"}, {"error": ERROR}, "no request id"),
        (400, {}, {"detail": "no"}, "an error in no shape of ours"),
        (400, {}, {"error": {"message": "no"}}, "an error in another shape"),
        (400, {}, {"error": {**ERROR, "message": "x" * 501}}, "an error that tells too much"),
        (200, STREAM, b"data: {}\n\ndata: [DONE]\n\n", None),
        (200, STREAM, b'data: {"error": {"code": "request_timeout"}}\n\n', None),
        (200, STREAM, b'data: {"error": {"code": "engine_dead"}}\n\n', "a stream that ended before its time"),
        (200, STREAM, b'data: {"choices": []}\n\n', "a stream that ended before its time"),
        (200, STREAM, b'data: {"choi', "a stream that ended before its time"),
        (200, STREAM, b"", "a stream that ended before its time"),
        (200, STREAM, response_event("completed"), None),
        (200, STREAM, response_event("incomplete"), None),
        (200, STREAM, response_event("completed")[:-1], "a stream that ended before its time"),
        (200, STREAM, response_event("in_progress"), "a stream that ended before its time"),
        (200, STREAM, response_event("failed", str(out_of_time())), None),
        (200, STREAM, response_event("failed", "the engine died"), "a stream that ended before its time"),
    ],
)
def test_the_fuzz_notices(status: int, headers: dict[str, str], body: Any, fault: str | None) -> None:
    request = httpx.Request("POST", "http://test/")
    given = {"x-request-id": "1", **headers}
    if given["x-request-id"] == "drop":
        del given["x-request-id"]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert FUZZ["fault_of"](httpx.Response(status, headers=given, content=content, request=request)) == fault


def test_the_soak_notices_another_text() -> None:
    async def main() -> list[str]:
        async with httpx.AsyncClient() as client:
            soak = SOAK["Soak"](client, random.Random(0), ["x"])
            soak.compare(1, ["a"], "streamed")
            soak.compare(1, ["a"], "whole")
            assert not soak.faults
            soak.compare(1, ["b"], "whole")
            return soak.faults  # type: ignore[no-any-return]

    (fault,) = asyncio.run(main())
    assert "request 1, whole" in fault


def test_the_soak_notices_memory_that_grows() -> None:
    mib = 1 << 20
    flat = [(400 + (number % 3)) * mib for number in range(40)]
    assert SOAK["growth"](flat)["flat"]
    assert not SOAK["growth"]([(400 + number) * mib for number in range(40)])["flat"]
    good = {"faults": [], "most_cache_usage_when_idle": 0.0, "healthy_after": True}
    told = {"memory_bytes": {"server": {"flat": True}, "engine": {"flat": False}}}
    assert SOAK["failed"](good | told, 20.0) and not SOAK["failed"](good | told, 0.1)
    assert SOAK["failed"](good | told | {"most_cache_usage_when_idle": 0.01}, 0.1)
