"""Users' own classes, named as `module:Class`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TypeVar

from outrider.errors import OptionError

T = TypeVar("T")
_PACKAGE = __name__.partition(".")[0]


def is_of_user(part: object) -> bool:
    """Whether the class of a part is a user's, and not of this package."""
    return type(part).__module__.partition(".")[0] != _PACKAGE


def import_class(what: str, name: str, base: type[T], public: str, facts: Sequence[str]) -> type[T]:
    """The class that `name` names. OptionError unless it is a complete subclass of `base`.

    `what`: the part it plays, for messages. `public`: where users find `base`. `facts`: class attributes it must have.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise OptionError(f"{what} {name} names no class: give module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: anything may go wrong in it
        raise OptionError(f"cannot import {what} {name}: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise OptionError(f"cannot import {what} {name}: module {module_name} has no class {class_name}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise OptionError(f"{what} {name} must be a subclass of {public}")
    missing = sorted(getattr(found, "__abstractmethods__", ())) if inspect.isabstract(found) else []
    missing += [fact for fact in facts if not hasattr(found, fact)]
    if missing:
        raise OptionError(f"{what} {name} is not complete: it lacks {', '.join(missing)}")
    return found
