"""Methods by name, and classes of one's own: what is wrong with them is told before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from outrider.draft.base import Drafter
from outrider.draft.host import HostDrafter
from outrider.draft.none import NoDrafter
from outrider.draft.registry import NO_DRAFTS, find_drafter, parse_speculative_config
from outrider.errors import CheckpointError, OptionError

BASE = "from outrider import Drafter, HostDrafter\n"
MODULES: dict[str, tuple[str, str, type[Exception] | None]] = {
    "class Mine(": ("", "SyntaxError", SyntaxError),
    "import nowhere_at_all": ("", "No module named 'nowhere_at_all'", ModuleNotFoundError),
    "import sys\nsys.nothing_of_the_kind": ("", "AttributeError: .*nothing_of_the_kind", AttributeError),
    "raise RuntimeError('not today')": ("", "RuntimeError: not today", RuntimeError),
    "class Yours: pass": ("", "has no class Mine", None),
    "Mine = 5": ("", "must be a subclass of outrider.Drafter", None),
    "class Mine(HostDrafter): pass": (BASE, "not complete: it lacks guess", None),
    "class Mine(Drafter): needs = frozenset()": (BASE, "not complete: it lacks propose, name", None),
}


@pytest.mark.parametrize("code", MODULES)
def test_modules_that_will_not_do(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, message, cause = MODULES[code]
    (tmp_path / "my_drafts.py").write_text(head + code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_drafts", raising=False)
    with pytest.raises(OptionError, match=f"drafter my_drafts:Mine.*{message}") as refused:
        find_drafter("my_drafts:Mine")
    assert refused.value.__cause__ is None if cause is None else isinstance(refused.value.__cause__, cause)
    monkeypatch.delitem(sys.modules, "my_drafts", raising=False)


@pytest.mark.parametrize("method", [":Foo", "outrider:", ":"])
def test_names_of_no_class(method: str) -> None:
    with pytest.raises(OptionError, match=f"{method} names no class: give module:Class"):
        find_drafter(method)


def test_a_relative_module() -> None:
    with pytest.raises(OptionError, match=r"cannot import drafter \.mine:Foo"):
        find_drafter(".mine:Foo")


def test_names() -> None:
    class Nameless(HostDrafter):
        def guess(self, slot: int, tokens: list[int]) -> Sequence[int]:
            return tokens

    class Named(Nameless):
        name = "named"

    class Heir(Named):
        pass

    local = f"{__name__}:test_names.<locals>"
    assert [one.name for one in (Nameless, Named, Heir)] == [f"{local}.Nameless", "named", f"{local}.Heir"]
    assert find_drafter(NO_DRAFTS) is NoDrafter
    assert (Drafter.rerun, Drafter.writes_ahead) == (0, False)


def test_a_class_with_the_name_of_a_method_of_ours_gets_no_head_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "namesake.py").write_text(
        "from dataclasses import dataclass\nfrom outrider import DraftOptions, HostDrafter\n"
        "from outrider.drafting import option\n\n"
        "@dataclass(frozen=True, slots=True)\nclass Options(DraftOptions):\n"
        "    model: str | None = option(None, 'a file')\n\n"
        "class Mine(HostDrafter):\n    name = 'peagle'\n    Options = Options\n"
        "    def guess(self, slot, tokens):\n        return tokens\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "heads" / "peagle").mkdir(parents=True)
    drafter, options = parse_speculative_config({"method": "namesake:Mine"}, tmp_path / "heads")
    assert drafter.__module__ == "namesake" and options.model is None  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="heads/peagle"):  # as ours does
        parse_speculative_config({"method": "peagle"}, tmp_path / "heads")
