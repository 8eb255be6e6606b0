"""The runner that records the step program: one CUDA graph per batch size, replayed; results read one step late."""

from __future__ import annotations

from typing import ClassVar

from outrider.capability import Feature, Offer

_ONE_PROCESS = "the graph runner holds the whole model in one process; leave it at 1"


class GraphRunner:
    """Replays recorded programs, and reads each step's tokens while the next one runs."""

    name: ClassVar[str] = "graph"
    depth: ClassVar[int] = 2
    offer: ClassVar[Offer] = Offer(
        has=frozenset(
            {
                Feature.TOKEN_HISTORY,
                Feature.FEATURES,
                Feature.DRAFT_CACHE,
                Feature.DRAFT_LOGITS,
                Feature.CUDA,
            }
        ),
        lacks={
            Feature.HOST_CODE: "a recorded step has no Python in it; write the part with tensors alone, or take the "
            "eager runner",
            Feature.CPU: "a CPU has no CUDA graphs to record; the eager runner is the fast one there",
            Feature.TENSOR: _ONE_PROCESS,
            Feature.PIPELINE: _ONE_PROCESS,
        },
    )
