"""What the engine asks of a worker, whichever process it runs in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from outrider.core.plan import StepPlan
from outrider.runner.base import Pending


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker at one moment."""

    part_times: dict[str, float] | None
    """Mean milliseconds of the parts of a decode step since the last `stats`; None if the runner cannot time them."""

    recorded: dict[str, float] | None
    """The "seconds" that recording programs took and the "bytes" they hold; None if the runner records nothing."""

    memory: int
    """Bytes that the worker's process holds: of its GPU by torch's allocator, else of the host's memory."""


class Worker(Protocol):
    """Runs step plans in order.

    `StepPlan` and `StepResult` are standard library only, so a worker may sit in any process. A split over ranks fits
    behind the same calls as `workers/group.py`: one worker a rank, `submit` sends the plan to every rank, and the
    result is rank 0's.
    """

    depth: int
    """Plans that may be submitted before the result of the oldest is read."""

    def submit(self, plan: StepPlan) -> Pending:
        """Starts a step. Raises what the runner raises, or EngineDeadError if the worker's process is gone."""

    def reset(self) -> None:
        """Forgets every request, after an interrupted step. Results of earlier plans are dropped."""

    def stats(self) -> WorkerStats:
        """The worker at this moment. Part times restart from zero."""

    def close(self) -> None:
        """Gives back the runner's memory, and ends the worker's process if it has one. Idempotent."""
