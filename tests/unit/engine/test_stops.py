"""Stop strings: found where a plain search finds them, at a cost that does not grow with their number."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core.sampling import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams
from outrider.engine.stops import StopSearch, StopStrings, _State
from outrider.errors import SamplingError

SETTINGS = settings(max_examples=400, deadline=None, derandomize=True)
LETTERS = st.text("abé😀", max_size=12)


def plain_search(pieces: Sequence[str], stop: Sequence[str]) -> list[tuple[tuple[int, str] | None, int]]:
    """For each piece what `StopSearch.feed` and `num_held` give, by trying every string everywhere."""
    found, text = [], ""
    for piece in pieces:
        before, text = len(text), text + piece
        ends = range(before + 1, len(text) + 1)
        ones = [(end - len(one), one) for end in ends for one in stop if text[:end].endswith(one)]
        best = min(ones, key=lambda one: (one[0], len(one[1])), default=None)
        beginnings = {one[:length] for one in stop for length in range(1, len(one))}
        held = max((length for length in range(len(text) + 1) if text[len(text) - length :] in beginnings), default=0)
        found.append((best and (best[0] - before, best[1]), held))
    return found


@SETTINGS
@given(pieces=st.lists(LETTERS, max_size=8), stop=st.lists(st.text("abé😀", min_size=1, max_size=5), max_size=6))
def test_a_plain_search_finds_the_same(pieces: list[str], stop: list[str]) -> None:
    search = StopSearch(StopStrings(stop))
    assert [(search.feed(piece), search.num_held) for piece in pieces] == plain_search(pieces, stop)


def test_a_wrong_fallback_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    after = StopStrings.after

    def forgetful(stops: StopStrings, state: _State, letter: str) -> _State:
        made = after(stops, state, letter)
        made.fallback = stops.start if made is not stops.start else None
        return made

    monkeypatch.setattr(StopStrings, "after", forgetful)
    search = StopSearch(StopStrings(["aab"]))
    assert [(search.feed(piece), search.num_held) for piece in "aaab"] != plain_search("aaab", ["aab"])


def seconds(stop: Sequence[str], text: str) -> float:
    """CPU time of one request's search in a text that comes four letters at a time."""
    best = 1e9
    for _ in range(3):
        start = time.process_time()
        search = StopSearch(StopStrings(stop))
        for at in range(0, len(text), 4):
            search.feed(text[at : at + 4])
            assert search.num_held >= 0
        best = min(best, time.process_time() - start)
    return best


def test_many_strings_cost_little_more_than_few() -> None:  # bug 12
    text = "the quick brown fox jumps over the lazy dog " * 100
    few = seconds(["zq0", "the x", "lazy cat", "fox jumps under"], text)
    many = seconds([f"{word} {number}" for number in range(1000) for word in ("the", "lazy", "fox", "z")], text)
    assert many < 20 * few + 0.02, f"{many:.4f} s for 4000 strings, {few:.4f} s for 4"


@pytest.mark.parametrize(
    "stop",
    [
        ["a" * length + "b" for length in range(1, 700)],  # every state falls back on every shorter one
        ["a" * (MAX_STOP_LENGTH - 1) + "b"],
        [chr(0x4E00 + number) for number in range(MAX_STOPS)],
    ],
    ids=["nested", "long", "initials"],
)
def test_the_worst_strings_cost_little_a_letter(stop: list[str]) -> None:
    text = "a" * 20_000 + "b"
    few = seconds(["ab", "aac"], text)
    assert seconds(stop, text) < 20 * few + 0.05


def test_states_are_no_more_than_letters() -> None:
    stops = StopStrings([f"{number:x}" * 8 for number in range(MAX_STOPS)])
    search = StopSearch(stops)
    for letter in "0123456789abcdef" * 20:
        search.feed(letter)

    def count(state: _State) -> int:
        return 1 + sum(count(child) for child in state.children.values())

    assert count(stops.start) < 400


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("stop", ["x"] * (MAX_STOPS + 1), f"holds {MAX_STOPS + 1} strings: give at most {MAX_STOPS}"),
        ("stop", "x" * (MAX_STOP_LENGTH + 1), f"characters in all: give at most {MAX_STOP_LENGTH}"),
        ("stop_token_ids", [1] * 10**6, "holds 1000000 ids; give at most 16"),
        ("stop_token_ids", list(range(17)), "holds 17 ids; give at most 16"),
        ("extra_args", {str(number): 1 for number in range(65)}, "holds 65 names: give at most 64"),
    ],
)
def test_more_than_may_be_is_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(SamplingError, match=said) as refused:
        SamplingParams(**{field: value})
    assert refused.value.field == field


def test_a_value_is_not_written_out_whole_to_be_refused() -> None:
    huge = [{"x": list(range(100))}] * 300_000
    start = time.process_time()
    with pytest.raises(SamplingError, match="must be a number"):
        SamplingParams(temperature=huge)  # type: ignore[arg-type]
    assert time.process_time() - start < 0.05, "all of it was written"
