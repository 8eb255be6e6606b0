"""The two forms of the log."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys

from outrider.engine.process.logs import ERASE, FIELDS, JsonFormatter


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


TOLD = """
import logging
from outrider.engine.process.logs import write_logs
write_logs("text")
logging.getLogger("outrider").info("recorded 4 programs")
logging.getLogger("other").info("nobody asked")
logging.getLogger("other").warning("a warning")
"""


def test_our_own_log_is_told_from_info_on_and_others_from_warnings_on() -> None:
    """In a process of its own, as an engine's is: the log of this one is pytest's."""
    done = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True, check=True, timeout=60)
    assert "INFO outrider recorded 4 programs" in done.stderr and "WARNING other a warning" in done.stderr
    assert "nobody asked" not in done.stderr
    assert ERASE not in done.stderr


def test_on_a_terminal_a_line_takes_the_place_of_a_progress_bar() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", TOLD], stderr=theirs, env=environment, check=True, timeout=60)
    told = os.read(ours, 4096).decode()
    os.close(ours)
    os.close(theirs)
    lines = told.removesuffix("\r\n").split("\r\n")
    assert len(lines) == 2 and all(line.startswith(ERASE) for line in lines) and "recorded 4 programs" in lines[0]
