"""The planted faults still fit the code, and `make test` would catch each of them."""

from __future__ import annotations

import pytest

from planted_faults import FAULTS, Fault, caught, planted

EACH = pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=f"{number}-{fault.file}") for number, fault in enumerate(FAULTS)]
)


@EACH
def test_a_fault_can_be_planted(fault: Fault) -> None:
    planted(fault)


def test_a_text_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match=r"cache/prefix\.py holds 'no such text' 0 times"):
        planted(Fault("cache/prefix.py", "no such text", "", ()))


def test_what_changes_nothing_is_not_caught() -> None:
    harmless = Fault(
        "cache/prefix.py", "class PrefixIndex:", "class PrefixIndex: ", ("tests/unit/cache/test_prefix.py",)
    )
    assert not caught(harmless)


@pytest.mark.slow
@EACH
def test_it_is_caught(fault: Fault) -> None:
    assert caught(fault)
