"""Fields of options records, with the help from which flags and pages are generated, and a check of their types."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    compare: bool = True,
    derived: bool = False,
    example: Callable[[], Mapping[str, Any]] | None = None,
) -> Any:
    """A dataclass field with its default and one line of help.

    `compare`: false for an option in which two runs of the same setting may differ, such as where a file is.
    `derived`: true for a field that is worked out from the others, so that no user sets it.
    `example`: makes one of a record, shown to those who give something else.
    """
    metadata = {"help": help, "derived": derived, "example": example}
    return field(default=default, compare=compare and not derived, metadata=metadata)


def option_names(record: Any) -> list[str]:
    """The fields of a dataclass, or of its type, that a user may set."""
    return [entry.name for entry in fields(record) if not entry.metadata.get("derived")]


def wrong_types(record: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, value and wanted type of each field of a dataclass whose value is not of its annotated type."""
    hints = typing.get_type_hints(type(record))
    for entry in fields(record):
        value, hint = getattr(record, entry.name), hints[entry.name]
        if not _is(value, hint):
            example = entry.metadata.get("example")
            yield entry.name, value, _name(hint) + (f", as {json.dumps(example())}" if example else "")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is(value, member) for member in _members(hint))
    origin = typing.get_origin(hint)
    if origin is not None:  # a mapping, or a sequence of one type; text is a sequence too, but never meant
        item = typing.get_args(hint)[0]
        listed = isinstance(value, origin) and not isinstance(value, (str, bytes))
        return listed and (issubclass(origin, typing.Mapping) or all(_is(each, item) for each in value))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, hint)


NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a record of names and values",
    type(None): "None",
}
"""Types as messages call them."""

PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _name(hint: Any) -> str:
    return " or ".join(_name_of_one(member) for member in _members(hint))


def _name_of_one(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is None or origin is Mapping:
        return NAMES.get(origin or hint, str(hint).split(".")[-1])
    item = typing.get_args(hint)[0]
    return f"a list of {PLURALS.get(item, 'values')}"
