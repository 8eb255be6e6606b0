"""A worker in this process: the seam behind which other processes and hosts will stand."""

from __future__ import annotations

from outrider.core.plan import StepPlan
from outrider.parallel.mesh import Mesh
from outrider.runner.base import Pending, Runner, RunnerConfig, TimesParts


class LocalWorker:
    """Hosts one runner in the calling process."""

    def __init__(self, runner: type[Runner], config: RunnerConfig, mesh: Mesh) -> None:
        """Builds the runner; whatever it raises is the caller's to report."""
        self._runner: Runner | None = runner.build(config, mesh)
        self.depth = runner.depth

    def submit(self, plan: StepPlan) -> Pending:
        """Starts a step; plans run in the order given."""
        assert self._runner is not None, "the worker is closed"
        return self._runner.submit(plan)

    def part_times(self) -> dict[str, float] | None:
        """As `TimesParts.part_times`; None if the runner cannot."""
        return self._runner.part_times() if isinstance(self._runner, TimesParts) else None

    def reset(self) -> None:
        """Forgets every request, as after an interrupted step."""
        assert self._runner is not None, "the worker is closed"
        self._runner.reset()

    def close(self) -> None:
        """Gives back the runner's memory. Idempotent."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
