"""What a runner is, and everything it is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch

from outrider.capability import Offer
from outrider.core.plan import StepPlan, StepResult
from outrider.core.sizes import Sizes
from outrider.draft.base import Drafter, DraftOptions, TargetFacts
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder
from outrider.parallel.mesh import Mesh
from outrider.runner.capture import CaptureOptions
from outrider.runner.memory import MemoryPlan
from outrider.verify.base import LogitsProcessor, Verifier


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """A resolved configuration: every question answered, nothing left to infer."""

    model: type[Decoder]
    model_config: ModelConfig
    target: TargetFacts  # the sizes, the device and what else a drafter may know
    directory: Path | None  # None: dummy weights
    drafter: type[Drafter]
    draft_options: DraftOptions
    verifier: Verifier
    processors: tuple[LogitsProcessor, ...]
    memory: MemoryPlan
    capture: CaptureOptions  # for a runner that records its steps
    seed: int
    progress: Callable[[int, int], None] | None  # bytes loaded, bytes in all
    recording: Callable[[int, int], None] | None = None  # programs recorded, programs in all

    @property
    def sizes(self) -> Sizes:
        """What the drafter, the memory plan and the scheduler go by too."""
        return self.target.sizes

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.target.dtype

    def count_loaded(self) -> Callable[[int], None]:
        """A function that adds up the bytes of weights loaded and reports them."""
        loaded = 0

        def count(size: int) -> None:
            nonlocal loaded
            loaded += size
            if self.progress is not None:
                self.progress(loaded, self.memory.weights)

        return count


class Pending(Protocol):
    """A step in flight."""

    def result(self) -> StepResult:
        """Wait for the step and read it. Idempotent."""


class Runner(Protocol):
    """Runs step plans on one device. Implementations differ in execution and nothing else."""

    name: ClassVar[str]
    offer: ClassVar[Offer]
    depth: ClassVar[int]  # steps that may be submitted before the oldest is read

    @classmethod
    def footprint(cls, capture: CaptureOptions) -> int:
        """Bytes of the device that the runner itself will hold beside weights, workspace and cache."""

    @classmethod
    def build(cls, config: RunnerConfig, mesh: Mesh) -> Self:
        """Load the models, size and bind the cache, and (if it records) record every program."""

    def submit(self, plan: StepPlan) -> Pending:
        """Start a step. Plans are run in the order given; `plan.step` counts them."""

    def reset(self) -> None:
        """Forget every request, as after an interrupted step. The next plan releases and reads nothing from before."""

    def close(self) -> None:
        """Give back memory and process groups. The runner is unusable afterwards."""


@runtime_checkable
class Records(Protocol):
    """What a runner that records its steps tells besides."""

    def recorded(self) -> dict[str, float]:
        """The "seconds" that recording took, and the "bytes" of the device that programs and their workspace took."""


@runtime_checkable
class TimesParts(Protocol):
    """What a runner may do besides: time its steps on the device, if built with `CaptureOptions.time_parts`."""

    def part_times(self) -> dict[str, float] | None:
        """Mean milliseconds of a decode step since the last call; None where nothing was timed.

        "inputs", "target", "verify" and "draft" between marks in the step, "gap" while the device waits for the next.
        """
