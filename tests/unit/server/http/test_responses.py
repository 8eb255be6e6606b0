"""Errors as clients are told of them."""

from __future__ import annotations

from outrider.errors import EngineDeadError, EngineRestartingError, FieldError
from outrider.server.http.responses import MAX_MESSAGE_LENGTH, describe


def test_a_message_does_not_send_back_all_that_was_sent() -> None:
    status, record, _ = describe(FieldError("x" * 10_000, "stop"))
    assert (
        status == 400 and len(record["error"]["message"]) == MAX_MESSAGE_LENGTH and record["error"]["param"] == "stop"
    )
    assert describe(FieldError("x" * MAX_MESSAGE_LENGTH))[1]["error"]["message"] == "x" * MAX_MESSAGE_LENGTH


def test_an_engine_that_is_started_anew_is_worth_asking_again() -> None:
    status, record, headers = describe(EngineRestartingError("wait", 7))
    assert (status, record["error"]["code"], headers) == (503, "engine_restarting", {"retry-after": "7"})
    assert describe(EngineDeadError("gone"))[1:] == (
        {"error": {"message": "gone", "type": "server_error", "param": None, "code": "engine_dead"}},
        {},
    )
