"""An engine from its options."""

from __future__ import annotations

import logging
from collections.abc import Callable

from outrider.config import resolve
from outrider.engine.engine import Engine
from outrider.options import EngineOptions
from outrider.workers.build import build_worker

logger = logging.getLogger("outrider")


def build_engine(
    options: EngineOptions,
    progress: Callable[[int, int], None] | None = None,  # bytes of weights loaded, and in all
    recording: Callable[[int, int], None] | None = None,  # programs recorded, and in all
) -> Engine:
    """Resolves the options and loads the model. Raises what that raises; RefusedError if no runner serves."""
    resolved = resolve(options, progress)
    choice = resolved.served_by()
    for name in ("capture_sizes", "capture_drafts"):
        if getattr(options, name) is not None and not resolved.runner.memory.programs:
            logger.warning("%s is not used: runner %s records nothing", name, choice.runner.name)
    for what, layers in (("model", choice.layers), ("drafter", choice.draft_layers)):
        if layers is not None:
            for reason in layers.reasons():
                logger.warning("layers of the %s run %s, %s", what, layers.backend.name, reason)
    return Engine(resolved, build_worker(resolved, recording))
