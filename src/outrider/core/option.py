"""A field of an options record, with the help from which flags and pages are generated."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with its default and one line of help."""
    return field(default=default, metadata={"help": help})
