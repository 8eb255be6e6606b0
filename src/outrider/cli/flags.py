"""Command-line flags made from the fields of options records, so that flag, help and record cannot drift."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from fractions import Fraction
from typing import Annotated, Any

import typer

from outrider.errors import OptionError


def with_flags(
    record: type[Any],  # a dataclass whose fields carry help
    argument: str,  # the command's parameter that takes the finished record
    *,
    skip: Iterable[str] = (),  # fields that no flag sets
    defaults: Mapping[str, Any] | None = None,  # defaults other than the record's own
    short: Mapping[str, str] | None = None,  # one-letter flags
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a typer command a flag for each field, and hands it the record under `argument`."""
    flagged = [entry for entry in fields(record) if entry.name not in set(skip)]
    hints = typing.get_type_hints(record)
    own = dict(defaults or {})

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in signature.parameters.values() if parameter.name != argument]
        added = [
            _parameter(entry, hints[entry.name], own, (short or {}).get(entry.name), argument) for entry in flagged
        ]

        def run(**given: Any) -> Any:
            values = {entry.name: _value(given.pop(entry.name), entry.name, hints[entry.name]) for entry in flagged}
            return command(**given, **{argument: record(**values)})

        run.__signature__ = inspect.Signature(kept + added)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in kept + added}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(
    entry: Field[Any], hint: Any, defaults: Mapping[str, Any], short: str | None, group: str
) -> inspect.Parameter:
    default = defaults.get(entry.name, None if entry.default is MISSING else entry.default)
    flag = "--" + entry.name.replace("_", "-")
    names = (
        (f"{flag}/--no-{flag[2:]}",) if bool in (hint, *typing.get_args(hint)) else (flag, short) if short else (flag,)
    )
    annotated: Any = Annotated
    numbers = _numbers_type(hint)
    metavar = None if numbers is None else f"{numbers.__name__.upper()},..."
    of_flag = _flag_type(hint)
    whole = whole_number if int in (of_flag, *typing.get_args(of_flag)) and numbers is None else None
    made = typer.Option(
        *names,
        help=entry.metadata["help"],
        metavar="<int>" if whole else metavar,
        parser=whole,
        rich_help_panel=f"{group.capitalize()} options",
    )
    annotation = annotated[of_flag, made]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_NUMBER = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?)(?:([kmgt])(i?)b?)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def whole_number(given: str | int) -> int:
    """A number as 4096, 32k (32,000), 32K (32,768), 1GB (10**9) or 1GiB (2**30).

    As in vLLM, a capital K, M, G or T alone is binary.
    """
    text = str(given).strip()
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text} is not a whole number: give digits, or a size as 32k, 32K, 1GB or 1GiB")
    number, unit, binary = found.groups()
    power = _POWERS[unit.lower()] if unit else 0
    is_binary = bool(binary) or (unit is not None and unit.isupper() and not text.lower().endswith("b"))
    value = Fraction(number.replace("_", "")) * (1024 if is_binary else 1000) ** power
    if value.denominator != 1:
        raise typer.BadParameter(f"{text} is not a whole number: give one without a fraction")
    return int(value)


def _numbers_type(hint: Any) -> type[int] | type[float] | None:
    """What a sequence of numbers, or None, holds; None for what is neither."""
    if not isinstance(hint, types.UnionType) or type(None) not in typing.get_args(hint):
        return None
    items = [item for member in typing.get_args(hint) for item in typing.get_args(member)]
    return items[0] if len(items) == 1 and items[0] in (int, float) else None


def _value(given: Any, name: str, hint: Any) -> Any:
    """What the record takes: of a sequence of numbers the parts of every text, which have commas between them."""
    numbers = _numbers_type(hint)
    if numbers is None or given is None:
        return given
    try:
        return [numbers(part) for text in given for part in text.split(",")]
    except ValueError:
        flag = f"--{name.replace('_', '-')}"
        raise OptionError(f"{flag} must be numbers with commas between: {','.join(given)}") from None


def _flag_type(hint: Any) -> Any:
    """What typer can parse: a sequence as a flag that may be repeated (numbers: as text), else the first member."""
    if not isinstance(hint, types.UnionType):
        return hint
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if type(None) not in typing.get_args(hint):
        return members[0]
    listed = [member for member in members if typing.get_origin(member) is not None]
    if listed:
        repeated: Any = list
        return repeated[str if _numbers_type(hint) else typing.get_args(listed[0])[0]] | None
    single: Any = members[0]
    return single | None
