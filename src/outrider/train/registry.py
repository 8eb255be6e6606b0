"""The training methods by name. A new method adds one line."""

from __future__ import annotations

from outrider.errors import OptionError, nearest
from outrider.train.eagle3 import Eagle3
from outrider.train.objective import Objective
from outrider.train.peagle import PEagle

OBJECTIVES: dict[str, type[Objective]] = {method.name: method for method in (Eagle3, PEagle)}


def find_objective(name: str | None) -> type[Objective]:
    """The method named, or OptionError naming the nearest."""
    if name is None:
        raise OptionError(f"say what to train with --method ({nearest('', OBJECTIVES)})")
    if name not in OBJECTIVES:
        raise OptionError(f"unknown training method: {name} ({nearest(name, OBJECTIVES)})")
    return OBJECTIVES[name]
