"""Stop strings, found as the text comes: the work for a letter does not depend on how many strings there are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache


class _State:
    """How far the end of a text has got: the longest beginning of a stop string that the text ends with."""

    __slots__ = ("children", "depth", "fallback", "found", "held", "high", "low")

    def __init__(self, stop: Sequence[str], depth: int, low: int, high: int, fallback: _State | None) -> None:
        """`stop[low:high]` are the strings with this beginning, `depth` letters long."""
        self.depth, self.low, self.high, self.fallback = depth, low, high, fallback
        self.children: dict[str, _State] = {}
        is_whole = fallback is not None and len(stop[low]) == depth
        self.found: str | None = stop[low] if is_whole else fallback.found if fallback is not None else None
        """The longest stop string that the text ends with."""
        is_open = high - low > is_whole
        self.held: int = depth if is_open or fallback is None else fallback.held
        """Letters at the end of the text that more text may complete to a stop string."""


class StopStrings:
    """The stop strings of a request, as the automaton of Aho and Corasick (1975).

    Its states are made when a text first reaches them. So a request costs a sort of its strings, and a state for each
    letter of text at most.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = sorted(set(stop))
        self.start = _State(self._stop, 0, 0, len(self._stop), None)
        """The state of an empty text."""
        self.initials = frozenset(one[0] for one in self._stop)
        """The letters that stop strings begin with."""

    def after(self, state: _State, letter: str) -> _State:
        """The state once a letter more has come."""
        to_make: list[tuple[_State, int, int]] = []
        at: _State | None = state
        found = None
        while at is not None:
            found = at.children.get(letter)
            if found is not None:
                break
            low, high = self._range(at, letter)
            if low < high:
                to_make.append((at, low, high))
            at = at.fallback
        made = found or self.start
        for parent, low, high in reversed(to_make):
            made = parent.children[letter] = _State(self._stop, parent.depth + 1, low, high, made)
        return made

    def _range(self, state: _State, letter: str) -> tuple[int, int]:
        """Which strings go on with this letter."""
        depth = state.depth

        def next_letter(stop: str) -> str:
            return stop[depth : depth + 1]

        low = bisect_left(self._stop, letter, state.low, state.high, key=next_letter)
        return low, bisect_right(self._stop, letter, low, state.high, key=next_letter)


@lru_cache(maxsize=16)
def stop_strings(stop: tuple[str, ...]) -> StopStrings:
    """Those of a request, which its completions share."""
    return StopStrings(stop)


class StopSearch:
    """Looks for stop strings in one text, piece by piece."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops, self._state = stops, stops.start

    @property
    def num_held(self) -> int:
        """Letters at the end of the text that may yet begin a stop string."""
        return self._state.held

    def feed(self, piece: str) -> tuple[int, str] | None:
        """The stop string that ends in the piece, and where it starts, counted from the start of the piece.

        Of several it is the one that starts first, then the shortest. The start is negative in an earlier piece.
        """
        stops, state = self._stops, self._state
        if state is stops.start and stops.initials.isdisjoint(piece):
            return None
        best: tuple[int, str] | None = None
        for end, letter in enumerate(piece, start=1):
            state = stops.after(state, letter)
            if state.found is not None:
                start = end - len(state.found)
                if best is None or start < best[0]:
                    best = start, state.found
        self._state = state
        return best
