"""How long a request may take: what a header may ask, and that everything ends at its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.responses import Response

from outrider.errors import DeadlineError, FieldError
from outrider.server.http import responses
from outrider.server.http.deadline import Deadline, seconds_asked
from outrider.server.http.responses import EventStream, describe, in_time

SOON = 0.02


@pytest.mark.parametrize(
    ("given", "most", "seconds"),
    [(None, None, None), (None, 5.0, 5.0), ("2.5", None, 2.5), ("2.5", 5.0, 2.5), ("5", 5.0, 5.0)],
)
def test_seconds(given: str | None, most: float | None, seconds: float | None) -> None:
    assert seconds_asked(given, most) == seconds


@pytest.mark.parametrize("given", ["", "x", "0", "-1", "nan", "inf", "6", "1e400"])
def test_wrong_seconds(given: str) -> None:
    with pytest.raises(FieldError, match="X-Request-Timeout") as wrong:
        seconds_asked(given, 5.0)
    assert wrong.value.field == "X-Request-Timeout"


def run(work: Any) -> tuple[Any, list[str]]:
    """What some work gives under a deadline, and what happened meanwhile."""
    happened: list[str] = []

    async def main() -> Any:
        return await in_time(Deadline.after(SOON, lambda: happened.append("passed")), work(happened))

    return asyncio.run(main()), happened


def test_work_is_cancelled_at_the_deadline() -> None:
    happened = []

    async def endless(_: Any) -> Response:
        try:
            await asyncio.Event().wait()
        finally:
            happened.append("cancelled")
        raise AssertionError

    with pytest.raises(DeadlineError, match=r"0\.02 seconds") as late:
        run(endless)
    assert happened == ["cancelled"]
    status, record, _ = describe(late.value)
    assert (status, record["error"]["code"], record["error"]["type"]) == (408, "request_timeout", "timeout_error")


def test_work_that_is_done_in_time_is_let_be() -> None:
    async def quick(_: Any) -> Response:
        return Response(b"done")

    answer, happened = run(quick)
    assert answer.body == b"done" and not happened


def test_a_timeout_of_the_work_s_own_is_no_deadline() -> None:
    async def fails(_: Any) -> Response:
        raise TimeoutError("of something else")

    with pytest.raises(TimeoutError, match="of something else"):
        run(fails)


def test_a_stream_ends_with_an_event_and_is_closed_before_it() -> None:
    happened: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        happened.append(message.get("body", b"").decode())

    async def main() -> None:
        async def stream() -> Response:
            return EventStream(events(), lambda: happened.append("closed"))

        deadline = Deadline.after(SOON, lambda: happened.append("passed"))
        response = await in_time(deadline, stream())
        await response({"type": "http"}, receive, send)

    asyncio.run(main())
    head, first, passed, closed, error, _ = happened
    assert (head, first, passed, closed) == ("", "data: 1\n\n", "passed", "closed")
    assert '"code":"request_timeout"' in error


def test_a_stream_that_nobody_reads_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "LAST_SECONDS", SOON)
    happened: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def main() -> None:
        async def stream() -> Response:
            return EventStream(events(), lambda: happened.append("closed"))

        response = await in_time(Deadline.after(SOON, lambda: happened.append("passed")), stream())
        await asyncio.wait_for(response({"type": "http"}, receive, send), 20)

    asyncio.run(main())
    assert happened[:2] == ["passed", "closed"]
