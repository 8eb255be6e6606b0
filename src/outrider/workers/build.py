"""Which worker hosts the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from outrider.config import Resolved
from outrider.workers.base import Worker
from outrider.workers.local import LocalWorker
from outrider.workers.process import ProcessWorker

WORKERS: dict[str, type[LocalWorker] | type[ProcessWorker]] = {"uni": LocalWorker, "mp": ProcessWorker}
"""By the option `distributed_executor_backend`."""


def build_worker(resolved: Resolved, recording: Callable[[int, int], None] | None = None) -> Worker:
    """The worker that the options ask for, with its model loaded.

    `recording` is called with the programs recorded, and in all. Raises what building the runner raises, and
    RefusedError if no runner serves.
    """
    kind = WORKERS[resolved.options.distributed_executor_backend]
    return kind(resolved.served_by().runner, replace(resolved.runner, recording=recording), resolved.mesh)
