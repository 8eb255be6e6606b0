"""The log: lines of text, or one JSON object a line, the same in the server's process and the engine's."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

LOG_FORMATS = ("text", "json")

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"

ERASE = "\r\x1b[2K"
"""Begins a line on a terminal: a progress bar there, be it another process's, gives way instead of preceding it."""

FIELDS = "fields"
"""Key of a mapping in a record's `extra`, which JSON shows entry by entry."""


class JsonFormatter(logging.Formatter):
    """`time` (ISO 8601, UTC), `level`, `logger`, `message`, what is under FIELDS, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def write_logs(log_format: str, level: int = logging.WARNING) -> None:
    """Sends the log of this process to stderr in one of LOG_FORMATS, or wherever was set up before.

    `level`: of other libraries' messages; our own are written from INFO on.
    """
    handler = logging.StreamHandler()
    text = ERASE + TEXT if sys.stderr.isatty() and Console(stderr=True).is_interactive else TEXT
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(text))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("outrider").setLevel(logging.INFO)
