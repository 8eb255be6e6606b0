"""Prompt lookup against a search in plain Python."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core.sizes import Sizes
from outrider.draft.base import DraftOptions, TargetFacts
from outrider.draft.ngram import Ngram, NgramOptions
from outrider.draft.none import NoDrafter
from outrider.errors import OptionError
from outrider.kernels.cpu.ngram import ngram_lookup_cpu
from outrider.kernels.gpu.ngram import ngram_lookup_gpu
from outrider.kernels.ngram import ngram_lookup_reference

INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)
IMPLEMENTATIONS = pytest.mark.parametrize("lookup", [ngram_lookup_reference, ngram_lookup_cpu])
FACTS = TargetFacts(10, 1, 1, Sizes(64, 4, 64, 16), torch.device("cpu"), torch.float32)


def search(text: list[int], num_drafts: int, shortest: int, longest: int) -> list[int]:
    """The longest earlier copy of the text's end, the latest of equals, and what came after it."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for stop in range(len(text) - 1, size - 1, -1):
            if text[stop - size : stop] == text[-size:]:
                after = text[stop:]
                if len(after) <= size:  # the copy overlaps the text's end: a period, which goes on
                    after = after * num_drafts
                return after[:num_drafts]
    return []


def run(lookup, texts: list[list[int]], num_drafts: int, shortest: int, longest: int) -> list[list[int]]:
    """Looks all texts up at once, each in a slot full of something else."""
    tokens = torch.full((len(texts), max(map(len, texts)) + 3), 1)
    for slot, text in enumerate(texts):
        tokens[slot, : len(text)] = torch.tensor(text)
    slot = torch.arange(len(texts)).flip(0)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    starts = torch.arange(len(texts) + 1, dtype=torch.int32)
    drafts, number = lookup(tokens, lengths, slot, starts, num_drafts, shortest, longest)
    assert drafts.shape == (len(texts), num_drafts) and drafts.dtype == torch.int64 and number.dtype == torch.int32
    assert (drafts[torch.arange(num_drafts) >= number[:, None]] == 0).all()
    return [row[:count] for row, count in zip(drafts.tolist(), number.tolist(), strict=True)][::-1]


TEXTS = st.integers(1, 4).flatmap(
    lambda alphabet: st.lists(st.lists(st.integers(0, alphabet), min_size=1, max_size=40), min_size=1, max_size=4)
)


@IMPLEMENTATIONS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts=TEXTS, num_drafts=st.integers(1, 6), shortest=st.integers(1, 3), more=st.integers(0, 3))
def test_lookup(lookup, texts: list[list[int]], num_drafts: int, shortest: int, more: int) -> None:
    expected = [search(text, num_drafts, shortest, shortest + more) for text in texts]
    assert run(lookup, texts, num_drafts, shortest, shortest + more) == expected


@INTERPRETED
@settings(max_examples=25, deadline=None, derandomize=True)
@given(texts=TEXTS, num_drafts=st.integers(1, 6), shortest=st.integers(1, 3), more=st.integers(0, 3))
def test_lookup_by_a_gpu_kernel(texts: list[list[int]], num_drafts: int, shortest: int, more: int) -> None:
    expected = [search(text, num_drafts, shortest, shortest + more) for text in texts]
    assert run(ngram_lookup_gpu, texts, num_drafts, shortest, shortest + more) == expected


@IMPLEMENTATIONS
def test_a_period_is_carried_on(lookup) -> None:
    assert run(lookup, [[9, 1, 2, 3, 1, 2, 3, 1, 2, 3]], 7, 2, 4) == [[1, 2, 3, 1, 2, 3, 1]]
    assert run(lookup, [[9, 4, 4]], 4, 1, 3) == [[4, 4, 4, 4]]


@IMPLEMENTATIONS
def test_a_copy_near_the_end_gives_what_there_is(lookup) -> None:
    assert run(lookup, [[1, 2, 7, 1, 2]], 5, 2, 2) == [[7, 1, 2]]


@IMPLEMENTATIONS
def test_the_latest_of_equal_copies_wins_and_a_longer_one_beats_it(lookup) -> None:
    assert run(lookup, [[1, 2, 5, 0, 1, 2, 6, 0, 1, 2]], 1, 1, 2) == [[6]]
    assert run(lookup, [[3, 1, 2, 5, 0, 1, 2, 6, 3, 1, 2]], 1, 1, 3) == [[5]]


@IMPLEMENTATIONS
def test_rows_inside_their_prompt_get_nothing(lookup) -> None:
    tokens = torch.zeros((3, 8), dtype=torch.int64)
    starts = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    _, number = lookup(tokens, torch.full((3,), 8, dtype=torch.int32), torch.arange(3), starts, 2, 1, 2)
    assert number.tolist() == [2, 0, 2]


def test_drafter() -> None:
    drafter = Ngram(NgramOptions(3), FACTS)
    slots = SimpleNamespace(tokens=torch.tensor([[0] * 8, [1, 2, 3, 4, 1, 2, 0, 0]]), length=torch.tensor([0, 6]).int())
    batch = SimpleNamespace(slot=torch.tensor([1]), logits_start=torch.tensor([0, 1]).int())
    draft = drafter.propose(SimpleNamespace(slots=slots, batch=batch))
    assert draft.tokens.tolist() == [[3, 4, 1]] and draft.length.tolist() == [3] and draft.logits is None


def test_no_drafter() -> None:
    drafter = NoDrafter(NoDrafter.Options(), FACTS)
    batch = SimpleNamespace(slot=torch.tensor([1, 0]))
    draft = drafter.propose(SimpleNamespace(batch=batch, committed=torch.ones(2, dtype=torch.int32)))
    assert drafter.num_drafts == 0 and draft.tokens.shape == (2, 0) and draft.length.tolist() == [0, 0]


@pytest.mark.parametrize("given", [{"prompt_lookup_min": 0}, {"prompt_lookup_max": 1}, {"num_speculative_tokens": 0}])
def test_options_that_cannot_be(given: dict[str, int]) -> None:
    (name,) = given
    with pytest.raises(OptionError, match=name):
        NgramOptions(**given)
    with pytest.raises(OptionError, match="num_speculative_tokens must be 0: 2"):
        NoDrafter.Options(2)
    assert DraftOptions().num_speculative_tokens >= 1
