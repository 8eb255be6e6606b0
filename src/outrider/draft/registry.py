"""The drafting methods by name. A new method adds one line; a user's own needs none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.core.option import option_names, wrong_types
from outrider.core.plugin import import_class
from outrider.core.reading import written_short
from outrider.draft.base import Drafter, DraftOptions, Match, Mismatch
from outrider.draft.eagle.eagle3 import Eagle3
from outrider.draft.eagle.peagle import PEagle
from outrider.draft.ngram import Ngram
from outrider.draft.none import NoDrafter
from outrider.draft.vllm_options import without_vllm_keys
from outrider.errors import CheckpointError, OptionError, nearest, shortened
from outrider.load.checkpoint import Checkpoint
from outrider.load.hub import HEAD_FILES, locate

METHODS: dict[str, type[Drafter]] = {method.name: method for method in (NoDrafter, Ngram, Eagle3, PEagle)}

NO_DRAFTS = NoDrafter.name
"""The method that drafts nothing: what turns speculation off."""


def default_method(model: str) -> str:
    """The method that drafts for BUNDLED_MODEL or ANY_MODEL where a command drafts and none is named."""
    (method,) = (drafter.name for drafter in METHODS.values() if drafter.default_for == model)
    return method


def names_head(draft: str) -> bool:
    """Whether what a user calls a draft is a head, a directory or a Hugging Face id, and not a method."""
    if draft in METHODS:
        return False
    return "/" in draft or draft.startswith((".", "~")) or Path(draft).is_dir()


def find_drafter(method: str) -> type[Drafter]:
    """A method of ours by name, or a user's class by `module:Class`. OptionError if there is none."""
    if method in METHODS:
        return METHODS[method]
    if ":" not in method:
        raise OptionError(
            f"unknown drafting method: {shortened(method)} ({nearest(method, METHODS)}, or module:Class for your own)"
        )
    facts = ("name", "needs")
    return import_class("drafter", method, Drafter, "outrider.Drafter", facts)  # type: ignore[type-abstract]


def parse_speculative_config(
    config: Mapping[str, Any] | None,
    heads: Path | None = None,  # directory of the target's own draft heads, by method
) -> tuple[type[Drafter], DraftOptions]:
    """The method a `speculative_config` names and its options. OptionError for a key the method lacks.

    A draft checkpoint's method is what the checkpoint says; a `method` or flag that contradicts it is refused.
    CheckpointError for a checkpoint that no method recognises, or that is broken.
    """
    if config is None:
        return NoDrafter, NoDrafter.Options()
    if not isinstance(config, Mapping):
        raise OptionError(
            f'speculative_config must map options to values, as {{"method": "ngram"}}: {written_short(config)}'
        )
    given = dict(config)
    if isinstance(given.get("model"), os.PathLike):
        given["model"] = os.fspath(given["model"])
    method = given.pop("method", None)
    if isinstance(method, str):
        named = find_drafter(method)
        ours = METHODS.get(named.name) is named  # and no user's class of the same name
        own = heads / named.name if heads is not None and ours and "model" in option_names(named.Options) else None
        if own is not None and own.is_dir() and given.get("model") is None:
            given["model"] = str(own)
        return resolve_options(named, given)
    if method is not None or not isinstance(given.get("model"), str):
        raise OptionError(
            f"speculative_config needs a method: {written_short(method)} ({nearest('', METHODS)}, or module:Class), "
            "or the model of a draft head"
        )
    return resolve_options(None, given)


def resolve_options(named: type[Drafter] | None, given: Mapping[str, Any]) -> tuple[type[Drafter], DraftOptions]:
    """The method and its options, with what its checkpoint decides. `named`: the method asked for, if one was.

    Raises as `parse_speculative_config` does.
    """
    given = {**given}
    derived: dict[str, Any] = {}
    if given.get("num_speculative_tokens") is None:
        given.pop("num_speculative_tokens", None)
    drafter = named
    if isinstance(given.get("model"), str) and (drafter is None or _checks_its_model(drafter)):
        checkpoint = Checkpoint.open(locate(given["model"], HEAD_FILES))
        drafter, match = _method_of(checkpoint, drafter, given)
        given = {**match.options, **given, "model": str(checkpoint.directory)}
        derived = {"checkpoint": checkpoint, "description": match.description}
    assert drafter is not None, "without a method there is a model"
    known = option_names(drafter.Options)
    given = without_vllm_keys(given, known)
    for key in given:
        if key not in known:
            close = nearest(key, known)
            listed = "" if close.startswith("known") else f" known: {', '.join(sorted(known))}"
            raise OptionError(f"speculative_config: {drafter.name} has no option {shortened(key)} ({close}{listed})")
    options = drafter.Options(**given, **derived)
    for name, value, wanted in wrong_types(options):
        raise OptionError(f"speculative_config: {name} must be {wanted}: {written_short(value)}")
    return drafter, options


def _checks_its_model(drafter: type[Drafter]) -> bool:
    """Whether the method says which checkpoints are its own; if not, its `model` is for itself alone to read."""
    overrides = drafter.recognises.__func__ is not Drafter.recognises.__func__  # type: ignore[attr-defined]
    return overrides and "model" in option_names(drafter.Options)


def _method_of(
    checkpoint: Checkpoint, named: type[Drafter] | None, given: Mapping[str, Any]
) -> tuple[type[Drafter], Match]:
    """The method that a checkpoint is of, by the answers of all; if one is named, it must be that one."""
    if named is not None:
        answer = named.recognises(checkpoint)
        if isinstance(answer, Match):
            return named, answer
        if isinstance(answer, Mismatch):
            raise CheckpointError(answer.reason)
    answers = [(method, method.recognises(checkpoint)) for method in METHODS.values() if method is not named]
    matches = [(method, answer) for method, answer in answers if isinstance(answer, Match)]
    if len(matches) > 1:
        both = " and ".join(method.name for method, _ in matches)
        raise OptionError(f"{checkpoint.directory} is a checkpoint of several methods, {both}: name the method")
    if not matches:
        reasons = "; ".join(dict.fromkeys(answer.reason for _, answer in answers if isinstance(answer, Mismatch)))
        if reasons and named is not None:
            reasons = f"{checkpoint.directory} is not of method {named.name}, nor of another: {reasons}"
        raise CheckpointError(reasons or _unknown(checkpoint, named))
    ((method, match),) = matches
    if named is not None and not named.also_means(method, given):
        raise OptionError(
            f"method {named.name} is not what {given['model']} was made for: it is a {match.kind}, "
            f"method {method.name}; drop method, or name that one"
        )
    return method, match


def _unknown(checkpoint: Checkpoint, named: type[Drafter] | None) -> str:
    """The message about a checkpoint of no method: what was found, and what each method would have wanted."""
    wants = {method.name: method.wants for method in (*METHODS.values(), named) if method is not None and method.wants}
    kind = checkpoint.config.get("speculators_model_type")
    if kind is not None:
        what = f"draft heads of type {shortened(str(kind))} are not supported: {nearest(str(kind), wants)}"
    elif _is_language_model(checkpoint):
        what = f"{checkpoint.directory} is not a draft head: its config.json is a language model's"
    else:
        what = f"{checkpoint.directory} is not a draft head of any method"
    wanted = "; ".join(f"{name} wants {text}" for name, text in wants.items())
    return f"{what}. Found: {checkpoint.summary()}. {wanted}"


def _is_language_model(checkpoint: Checkpoint) -> bool:
    names = checkpoint.config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
