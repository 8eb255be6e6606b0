"""Drafters of plain Python: what they may return, and what becomes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from outrider.core.sizes import Sizes
from outrider.draft.base import DraftOptions, TargetFacts
from outrider.draft.host import HostDrafter
from outrider.errors import OptionError
from outrider.tensors import Draft

FACTS = TargetFacts(10, 1, 1, Sizes(64, 4, 64, 16), torch.device("cpu"), torch.float32)


class Saying(HostDrafter):
    said: Any = ()

    def guess(self, slot: int, tokens: list[int]) -> Any:
        assert (slot, tokens) == (1, [4, 5])
        return self.said


def draft(said: Any) -> Draft:
    drafter = Saying(DraftOptions(3), FACTS)
    drafter.said = said
    slots = SimpleNamespace(tokens=torch.tensor([[0, 0], [4, 5]]), length=torch.tensor([2, 2]))
    batch = SimpleNamespace(slot=torch.tensor([1, 0]), logits_start=torch.tensor([0, 1, 1]))  # the second row is inside
    return drafter.propose(SimpleNamespace(slots=slots, batch=batch))


@pytest.mark.parametrize(
    "said", [[7, 8], (7, 8), np.array([7, 8]), [np.int32(7), np.uint8(8)], torch.tensor([7, 8])], ids=repr
)
def test_whole_numbers_of_any_kind(said: Any) -> None:
    found = draft(said)
    assert found.tokens.tolist() == [[7, 8, 0], [0, 0, 0]] and found.length.tolist() == [2, 0]


def test_more_than_k_are_cut_off() -> None:
    assert draft([1, 2, 3, 4, 5]).tokens.tolist() == [[1, 2, 3], [0, 0, 0]]


@pytest.mark.parametrize("said", [[1.0], [2, "a"], np.array([1.5]), None, 5, [None], [[1]]], ids=repr)
def test_what_is_no_token(said: Any) -> None:
    with pytest.raises(OptionError, match="drafter Saying must guess whole numbers"):
        draft(said)


@pytest.mark.parametrize("said", [[-1], [1, 10], [2**70]])
def test_what_is_outside_the_vocabulary(said: list[int]) -> None:
    with pytest.raises(OptionError, match=f"guessed token {said[-1]}, outside the vocabulary of 10"):
        draft(said)
