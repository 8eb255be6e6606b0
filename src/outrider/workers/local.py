"""A worker in this process: the seam behind which other processes and hosts will stand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from outrider.core.plan import StepPlan
from outrider.errors import CapacityError
from outrider.parallel.mesh import Mesh
from outrider.runner.base import Pending, Records, Runner, RunnerConfig, TimesParts


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the thread's own: kernels are launched on that one, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class LocalWorker:
    """Hosts one runner in the calling process."""

    def __init__(self, runner: type[Runner], config: RunnerConfig, mesh: Mesh) -> None:
        """Builds the runner. Whatever it raises is the caller's to report; CapacityError if memory runs out."""
        self._device = config.device
        with on_device(self._device):
            try:
                self._runner: Runner | None = runner.build(config, mesh)
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"memory ran out on {config.device} while the model was loaded and its cache made, though the plan "
                    "fits what was free before: free what else takes memory there, or lower gpu_memory_utilization or "
                    "kv_cache_memory"
                ) from error
        self.depth = runner.depth

    def submit(self, plan: StepPlan) -> Pending:
        """Starts a step; plans run in the order given."""
        assert self._runner is not None, "the worker is closed"
        with on_device(self._device):
            return self._runner.submit(plan)

    def part_times(self) -> dict[str, float] | None:
        """As `TimesParts.part_times`; None if the runner cannot."""
        return self._runner.part_times() if isinstance(self._runner, TimesParts) else None

    def recorded(self) -> dict[str, float] | None:
        """As `Records.recorded`; None if the runner records nothing."""
        return self._runner.recorded() if isinstance(self._runner, Records) else None

    def reset(self) -> None:
        """Forgets every request, as after an interrupted step."""
        assert self._runner is not None, "the worker is closed"
        with on_device(self._device):
            self._runner.reset()

    def close(self) -> None:
        """Gives back the runner's memory. Idempotent."""
        if self._runner is not None:
            with on_device(self._device):
                self._runner.close()
            self._runner = None
