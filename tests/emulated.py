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
    def __init__(self, fetched: list[tuple[Tensor, Tensor]]) -> None:
        self._fetched = fetched

    @torch.inference_mode()
    def wait(self) -> None:
        for out, value in self._fetched:
            out.copy_(value)


class Recorder:
    """As `runner.recorder.Recorder`, on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._fetched: list[tuple[Tensor, Tensor]] = []
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
        return Fence(fetched)

    def marks(self, names: tuple[str, ...]) -> Marks:
        return Marks(names)

    def used(self) -> int:
        return 0


class Marks:
    """Marks that are a millisecond apart, and remember the order they were set in."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.set: list[str] = []

    def __call__(self, name: str) -> None:
        assert name in self._names
        self.set.append(name)

    def milliseconds(self, name: str, other: Marks, later: str) -> float:
        assert name in self.set and later in other.set
        return 1.0


class Emulated(GraphRunner):
    """The graph runner on a CPU."""

    recorder: ClassVar[type[Recorder]] = Recorder
    offer: ClassVar[Offer] = Offer(
        has=GraphRunner.offer.has | {Feature.CPU},
        lacks={feature: reason for feature, reason in GraphRunner.offer.lacks.items() if feature is not Feature.CPU},
    )
