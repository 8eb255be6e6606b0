"""Typed readers of a checkpoint's JSON: each value is of its type and in its range, or an error names it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.errors import CheckpointError, shortened

MAX_WRITTEN = 80
"""Characters of a value that a message shows."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What was taken of something that more than one place may say."""

    name: str
    taken: Any
    """As JSON would have it."""
    said: Mapping[str, Any]
    """What each place says, by its name."""
    note: str | None = None
    """What a user should know: the places differ, or one of them cannot be followed."""

    def to_dict(self) -> dict[str, Any]:
        """For `outrider explain --json`."""
        return {"taken": self.taken, "said": dict(self.said), "note": self.note}

    def __str__(self) -> str:
        taken = "none" if self.taken in (None, [], {}) else self.taken
        said = "; ".join(f"{source}: {shortened(str(value))}" for source, value in self.said.items())
        return f"{self.name} {shortened(str(taken))}{f' ({said})' if said else ''}"


@dataclass(frozen=True, slots=True)
class Reader:
    """The values of a JSON object by key. A value of null is as good as none.

    Every method raises CheckpointError for a value of another type or out of range; where no default is given, also
    for a key that is missing.
    """

    values: Mapping[str, Any]
    file: str = "config.json"
    prefix: str = field(default="", kw_only=True)  # of keys in messages, for a nested object

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def whole(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """A whole number in [low, high]."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, "a whole number")
        if not low <= value <= high:
            raise self.error(key, value, f"a whole number from {low} to {high}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float, high: float = math.inf, open_below: bool = False
    ) -> float:
        """A finite number of `low` or more, or above `low`, and of at most `high`."""
        value = self._given(key, default)
        number = as_number(value)
        if not (number > low if open_below else number >= low):
            raise self.error(key, value, f"a number {'above' if open_below else 'of at least'} {low:g}")
        if number > high:
            raise self.error(key, value, f"a number of at most {high:g}")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._given(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty if there is none."""
        value = self._given(key, ())
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
            raise self.error(key, value, "a list of texts")
        return list(value)

    def numbers(self, key: str, *, low: float) -> tuple[float, ...]:
        """A list of finite numbers above `low`."""
        value = self._given(key, None)
        if not isinstance(value, list) or not value or not all(as_number(one) > low for one in value):
            raise self.error(key, value, f"a list of numbers above {low:g}")
        return tuple(as_number(one) for one in value)

    def inner(self, key: str) -> Reader:
        """A nested object; empty if there is none."""
        value = self._given(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return Reader(value, self.file, prefix=f"{key}.")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """None, one or several token ids; here they are always several."""
        value = self._given(key, ())
        listed = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31 for token in listed):
            raise self.error(key, value, "token ids, whole numbers from 0 to 2147483647")
        return tuple(listed)

    def error(self, key: str, value: Any, wanted: str) -> CheckpointError:
        """What is wrong with a value, and what to do about it."""
        written = written_short(value)
        return CheckpointError(f"{self.file}: {self.prefix}{key} must be {wanted}: {written}; correct it there")

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.file} lacks {self.prefix}{key}: add it")
        return value


def as_number(value: Any) -> float:
    """A finite number as a float; nan for what is none, of which no comparison is true."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def written_short(value: Any) -> str:
    """A value for a message, whatever its size, its depth and its number of digits.

    No more of it is written than is shown.
    """
    parts: list[str] = []
    length = 0
    try:
        for part in _written(value):
            parts.append(part)
            length += len(part)
            if length > MAX_WRITTEN:
                break
    except (RecursionError, ValueError):
        return f"{type(value).__name__}, too large to be written here"
    return shortened("".join(parts))


def _written(value: Any) -> Iterator[str]:
    """`repr` in parts."""
    kind = type(value)
    if kind in (str, bytes):
        yield repr(value[: MAX_WRITTEN + 1])
    elif kind is dict:
        yield "{"
        for index, (name, inner) in enumerate(value.items()):
            yield ", " if index else ""
            yield from _written(name)
            yield ": "
            yield from _written(inner)
        yield "}"
    elif kind in (list, tuple):
        yield "[" if kind is list else "("
        for index, inner in enumerate(value):
            yield ", " if index else ""
            yield from _written(inner)
        yield "]" if kind is list else ",)" if len(value) == 1 else ")"
    else:
        yield repr(value)
