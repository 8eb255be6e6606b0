"""The graph runner where there is no GPU: a recorder that calls what it is to record, and hands results out late.

What is fetched from the device is not to be had before its fence is passed, as on a GPU; until then it is nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from outrider.capability import Feature, Offer
from outrider.runner.graph import GraphRunner

ABSURD = -(10**6)


class Fence:
    def __init__(self, fetched: list[tuple[Tensor, Tensor]], marks: dict[Marks, int]) -> None:
        self._fetched, self._marks = fetched, marks

    @torch.inference_mode()
    def wait(self) -> None:
        for out, value in self._fetched:
            out.copy_(value)
        for marks, num_set in self._marks.items():
            marks.num_passed = num_set


class Recorder:
    """As `runner.recorder.Recorder`, on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._fetched: list[tuple[Tensor, Tensor]] = []
        self._marks: list[Marks] = []
        self.num_recorded = 0
        self.num_replayed = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            body()

        return replay

    def fetch(self, x: Tensor) -> Tensor:
        out = torch.full_like(x, ABSURD)
        self._fetched.append((out, x.clone()))
        return out

    def fence(self) -> Fence:
        fetched, self._fetched = self._fetched, []
        return Fence(fetched, {marks: len(marks.set) for marks in self._marks})

    def marks(self, names: tuple[str, ...]) -> Marks:
        self._marks.append(Marks(names))
        return self._marks[-1]

    def used(self) -> int:
        return 0


class Marks:
    """Marks that are a millisecond apart, and cannot be read while a later run is setting them again."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.set: list[str] = []
        self.num_passed = 0

    def __call__(self, name: str) -> None:
        assert name in self._names
        self.set.append(name)

    def milliseconds(self, name: str, other: Marks, later: str) -> float:
        assert name in self.set and later in other.set
        assert self.num_passed == len(self.set) and other.num_passed == len(other.set), "both runs must be over"
        return 1.0


class Emulated(GraphRunner):
    """The graph runner on a CPU."""

    recorder: ClassVar[type[Recorder]] = Recorder
    offer: ClassVar[Offer] = Offer(
        has=GraphRunner.offer.has | {Feature.CPU},
        lacks={feature: reason for feature, reason in GraphRunner.offer.lacks.items() if feature is not Feature.CPU},
    )
