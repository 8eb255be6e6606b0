"""A worker in the engine's own process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import psutil
import torch

from outrider.core.plan import StepPlan
from outrider.errors import CapacityError, EngineClosedError
from outrider.parallel.mesh import Mesh
from outrider.runner.base import Pending, Records, Runner, RunnerConfig, TimesParts
from outrider.workers.base import WorkerStats


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one of this thread: Triton launches kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class LocalWorker:
    """Hosts one runner in the calling process."""

    def __init__(self, runner: type[Runner], config: RunnerConfig, mesh: Mesh) -> None:
        """Builds the runner. Raises what the runner raises, and CapacityError if memory runs out."""
        self._device = config.device
        self._on_cpu = config.device.type == "cpu"
        with on_device(self._device):
            try:
                self._runner: Runner | None = runner.build(config, mesh)
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"memory ran out on {config.device} while the model was loaded and its cache made, though the plan "
                    "fits what was free before: free what else takes memory there, or lower gpu_memory_utilization or "
                    "kv_cache_memory"
                ) from error
        if config.device.type == "cpu":
            import_module("outrider.kernels.cpu.first_run").compile_missing()
        self.depth = runner.depth

    def submit(self, plan: StepPlan) -> Pending:
        """Starts a step; plans run in the order given."""
        if self._runner is None:
            raise EngineClosedError
        if self._on_cpu:
            return self._runner.submit(plan)
        with on_device(self._device):
            return self._runner.submit(plan)

    def reset(self) -> None:
        """Forgets every request, as after an interrupted step."""
        if self._runner is None:
            raise EngineClosedError
        with on_device(self._device):
            self._runner.reset()

    def stats(self) -> WorkerStats:
        """As `Worker.stats`."""
        runner = self._runner
        if runner is None:
            raise EngineClosedError
        on_gpu = self._device.type == "cuda"
        return WorkerStats(
            part_times=runner.part_times() if isinstance(runner, TimesParts) else None,
            recorded=runner.recorded() if isinstance(runner, Records) else None,
            memory=torch.cuda.memory_reserved(self._device) if on_gpu else psutil.Process().memory_info().rss,
        )

    def close(self) -> None:
        """Gives back the runner's memory. Idempotent."""
        if self._runner is not None:
            with on_device(self._device):
                self._runner.close()
            self._runner = None
