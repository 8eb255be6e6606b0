"""The drafting methods by name. A new method adds one line; a user's own needs none."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from outrider.draft.base import Drafter, DraftOptions
from outrider.draft.ngram import Ngram
from outrider.draft.none import NoDrafter
from outrider.errors import OptionError, nearest

METHODS: dict[str, type[Drafter]] = {method.name: method for method in (NoDrafter, Ngram)}

WITHOUT_WEIGHTS = Ngram.name
"""The method that serves any model, since it needs no checkpoint of its own."""

NO_DRAFTS = NoDrafter.name
"""The method that drafts nothing: what turns speculation off."""


def find_drafter(method: str) -> type[Drafter]:
    """A method of ours by name, or a user's class by `module:Class`. OptionError if there is none."""
    if method in METHODS:
        return METHODS[method]
    module_name, colon, class_name = method.partition(":")
    if not colon:
        raise OptionError(
            f"unknown drafting method: {method} ({nearest(method, METHODS)}, or module:Class for your own)"
        )
    if not module_name or not class_name:
        raise OptionError(f"drafter {method} names no class: give module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: anything may go wrong in it
        raise OptionError(f"cannot import drafter {method}: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise OptionError(f"cannot import drafter {method}: module {module_name} has no class {class_name}")
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise OptionError(f"drafter {method} must be a subclass of outrider.Drafter")
    missing = sorted(found.__abstractmethods__) if inspect.isabstract(found) else []
    missing += [fact for fact in ("name", "needs") if not hasattr(found, fact)]
    if missing:
        raise OptionError(f"drafter {method} is not complete: it lacks {', '.join(missing)}")
    return found


def parse_speculative_config(config: Mapping[str, Any] | None) -> tuple[type[Drafter], DraftOptions]:
    """The method a `speculative_config` names and its options. OptionError for a key the method lacks."""
    if config is None:
        return NoDrafter, NoDrafter.Options()
    if not isinstance(config, Mapping):
        raise OptionError(f'speculative_config must map options to values, as {{"method": "ngram"}}: {config!r}')
    given = dict(config)
    method = given.pop("method", None)
    if not isinstance(method, str):
        raise OptionError(f"speculative_config needs a method: {method!r} ({nearest('', METHODS)}, or module:Class)")
    drafter = find_drafter(method)
    known = {option.name for option in fields(drafter.Options)}
    for key in given:
        if key not in known:
            raise OptionError(f"speculative_config: {method} has no option {key} ({nearest(key, known)})")
    return drafter, drafter.Options(**given)
