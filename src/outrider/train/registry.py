"""The training methods by name. A new method adds a line here, and its options to `TrainOptions`."""

from __future__ import annotations

from dataclasses import fields

from outrider.errors import OptionError, nearest
from outrider.train.eagle3 import Eagle3
from outrider.train.objective import Objective
from outrider.train.options import CommonOptions
from outrider.train.peagle import PEagle

OBJECTIVES: dict[str, type[Objective]] = {method.name: method for method in (Eagle3, PEagle)}


def find_objective(name: str | None) -> type[Objective]:
    """The method named, or OptionError naming the nearest."""
    if name is None:
        raise OptionError(f"say what to train with --method ({nearest('', OBJECTIVES)})")
    if name not in OBJECTIVES:
        raise OptionError(f"unknown training method: {name} ({nearest(name, OBJECTIVES)})")
    return OBJECTIVES[name]


def refuse_options_of_others(method: type[Objective], options: CommonOptions) -> None:
    """OptionError for an option of another method that is set: nothing would come of it."""
    known = {entry.name for entry in fields(method.Options)}
    for other in OBJECTIVES.values():
        for entry in fields(other.Options):
            value = getattr(options, entry.name)
            if entry.name not in known and value != entry.default:
                raise OptionError(f"{entry.name} {value} is an option of {other.name}: leave it out for {method.name}")
