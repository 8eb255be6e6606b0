"""The two forms of the log."""

from __future__ import annotations

import json
import logging

from outrider.engine.logs import FIELDS, JsonFormatter


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("outrider.x", logging.WARNING, "file", 1, message, arguments, None)
    made.__dict__.update(more)
    return made


def test_json_is_one_object_a_line() -> None:
    line = JsonFormatter().format(record("a\n%s é", "b", **{FIELDS: {"status": 200}}))
    told = json.loads(line)
    assert "\n" not in line and told.pop("time").endswith("+00:00")
    assert told == {"level": "warning", "logger": "outrider.x", "message": "a\nb é", "status": 200}


def test_json_shows_exceptions() -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        told = json.loads(JsonFormatter().format(record("failed", exc_info=(ValueError, error, error.__traceback__))))
    assert told["exception"].startswith("Traceback") and "ValueError: why" in told["exception"]
