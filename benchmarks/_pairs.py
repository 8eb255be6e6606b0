"""What the scripts here share: runs in turn, so that a machine whose speed drifts is fair to all; medians of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Timings = dict[str, list[float]]


def in_turn(contestants: Mapping[str, Callable[[], object]], rounds: int) -> Timings:
    """Seconds of each contestant, A B C A B C ..., after one uncounted round."""
    seconds: Timings = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Timings, slower: str, faster: str) -> float:
    """How many times faster, as the median over rounds of slower / faster."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


def spread(seconds: Timings, slower: str, faster: str) -> list[float]:
    """The least and the largest of those ratios."""
    ratios = [a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)]
    return [min(ratios), max(ratios)]
