"""What is promised: the `__all__` of each public module is complete and sorted, and the guide names all of it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "guide" / "extending.md").read_text()
MODULES = re.findall(r"`(outrider[\w.]*)`", PAGE.split("\n\n")[1])


def missing_from_all(module: ModuleType) -> set[str]:
    """Names of its own or imported that `__all__` leaves out, or names without there being such a thing."""
    names = {name for name in dir(module) if not name.startswith("_") and name != "annotations"}
    return {name for name in names if not isinstance(getattr(module, name), ModuleType)} ^ set(module.__all__)


def test_the_page_says_which_modules_are_public() -> None:
    assert {"outrider", "outrider.drafting", "outrider.modelling"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete_and_sorted(name: str) -> None:
    module = importlib.import_module(name)
    assert missing_from_all(module) == set()
    # constants and acronyms first, as the linter sorts
    assert list(module.__all__) == sorted(module.__all__, key=lambda each: (not each.isupper(), each))


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    said = set(re.findall(r"`(\w+)", PAGE))
    assert set(module.__all__) - said == set()
    held = {each: getattr(module, each) for each in module.__all__}
    assert [each for each, thing in held.items() if isinstance(thing, type) and not thing.__doc__] == []


def test_the_check_can_fail() -> None:
    module = ModuleType("planted")
    vars(module).update(__all__=["one", "gone"], one=1, two=2)
    assert missing_from_all(module) == {"two", "gone"}
