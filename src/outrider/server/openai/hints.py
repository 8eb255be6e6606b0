"""Fields that clients send and on which no answer depends: checked, kept nowhere, and named once in the log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from outrider.engine.hints import note_hint

_MARK = "x-hint"

ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Summary = Literal["auto", "concise", "detailed"]


def hint(why: str = "it changes nothing here, and is kept nowhere") -> Any:
    """A field that is taken whatever it says, and why nothing follows from it."""
    return Field(None, description=f"taken: {why}", json_schema_extra={_MARK: why})


def note_hints(record: BaseModel, prefix: str = "") -> None:
    """Names each hint that a request gives in the log, once in the life of the process."""
    for name, field in type(record).model_fields.items():
        value = getattr(record, name)
        if isinstance(value, BaseModel):
            note_hints(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for each in value:
                if isinstance(each, BaseModel):
                    note_hints(each, f"{prefix}{name}[].")
        extra = field.json_schema_extra
        if value is not None and isinstance(extra, dict) and _MARK in extra:
            note_hint(f"{prefix}{name}", str(extra[_MARK]))
