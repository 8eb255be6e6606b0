"""The drafting methods by name. A new method adds one line; a user's own needs none."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from outrider.core.option import wrong_types
from outrider.draft.base import Drafter, DraftOptions
from outrider.draft.eagle.checkpoint import read_head
from outrider.draft.eagle.eagle3 import Eagle3
from outrider.draft.eagle.peagle import PEagle
from outrider.draft.ngram import Ngram
from outrider.draft.none import NoDrafter
from outrider.errors import OptionError, nearest
from outrider.load.hub import HEAD_FILES, locate

METHODS: dict[str, type[Drafter]] = {method.name: method for method in (NoDrafter, Ngram, Eagle3, PEagle)}

WITHOUT_WEIGHTS = Ngram.name
"""The method that serves any model, since it needs no checkpoint of its own."""

NO_DRAFTS = NoDrafter.name
"""The method that drafts nothing: what turns speculation off."""

FOR_BUNDLED = PEagle.name
"""The method that serves the bundled model where none is named."""

SAID_BY_HEAD = ("model", "parallel_drafting")
"""Options that name a draft head, or only repeat what it is: two runs of one head do not differ in them."""


def names_head(draft: str) -> bool:
    """Whether what a user calls a draft is a head, a directory or a Hugging Face id, and not a method."""
    if draft in METHODS:
        return False
    return "/" in draft or draft.startswith((".", "~")) or Path(draft).is_dir()


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


def parse_speculative_config(
    config: Mapping[str, Any] | None,
    heads: Path | None = None,  # directory of the target's own draft heads, by method
) -> tuple[type[Drafter], DraftOptions]:
    """The method a `speculative_config` names and its options. OptionError for a key the method lacks.

    A draft head's method is what its checkpoint says; a `method` or flag that contradicts it is refused.
    """
    if config is None:
        return NoDrafter, NoDrafter.Options()
    if not isinstance(config, Mapping):
        raise OptionError(f'speculative_config must map options to values, as {{"method": "ngram"}}: {config!r}')
    given = dict(config)
    if isinstance(given.get("model"), os.PathLike):
        given["model"] = os.fspath(given["model"])
    method = given.pop("method", None)
    if method is None and isinstance(given.get("model"), str):
        drafter = _of_head(given)
    elif isinstance(method, str):
        drafter = find_drafter(method)
        if "model" in {option.name for option in fields(drafter.Options)}:
            own = heads / drafter.name if heads is not None else None
            if given.get("model") is None and own is not None and own.is_dir():
                given["model"] = str(own)
            drafter = _fitting(drafter, given)
    else:
        raise OptionError(
            f"speculative_config needs a method: {method!r} ({nearest('', METHODS)}, or module:Class), "
            "or the model of a draft head"
        )
    known = {option.name for option in fields(drafter.Options)}
    for key in given:
        if key not in known:
            raise OptionError(f"speculative_config: {drafter.name} has no option {key} ({nearest(key, known)})")
    options = drafter.Options(**given)
    for name, value, wanted in wrong_types(options):
        raise OptionError(f"speculative_config: {name} must be {wanted}: {value!r}")
    return drafter, options


def _of_head(given: dict[str, Any]) -> type[Drafter]:
    """The method that a draft head was made for. Puts its directory and what it says of K into `given`."""
    directory = locate(given["model"], HEAD_FILES)
    head = read_head(directory)
    given["model"] = str(directory)
    if given.get("num_speculative_tokens") is None:
        given.pop("num_speculative_tokens", None)
        if head.num_drafts is not None:
            given["num_speculative_tokens"] = head.num_drafts
    return next(method for method in METHODS.values() if method.serves(head))


def _fitting(drafter: type[Drafter], given: dict[str, Any]) -> type[Drafter]:
    """The drafter that was named, if it is one for the head that was named; or the head's own in vLLM's spelling.

    vLLM calls a P-EAGLE head method "eagle3" with parallel_drafting true.
    """
    if not isinstance(given.get("model"), str):
        raise OptionError(
            f'method {drafter.name} needs its draft head: give "model", a local directory or a Hugging Face id'
        )
    right = _of_head(given)
    head = read_head(Path(given["model"]))
    if drafter.serves(head):
        return drafter
    if head.parallel and given.get("parallel_drafting") is True:
        return right
    raise OptionError(
        f"method {drafter.name} is not what {given['model']} was made for: it is a {head.layout} head, "
        f"method {right.name}; drop method, or name that one"
    )
