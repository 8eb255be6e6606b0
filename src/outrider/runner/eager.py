"""The runner that calls the step program: any device, any part, results at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from outrider.capability import Feature, Offer
from outrider.core.plan import StepPlan, StepResult
from outrider.models.decoder import Decoder
from outrider.parallel.mesh import Mesh
from outrider.runner.base import RunnerConfig
from outrider.runner.bound import Bound, build_model, rows_of
from outrider.runner.capture import CaptureOptions
from outrider.runner.slots import to_device

_ONE_PROCESS = "the eager runner holds the whole model in one process; leave it at 1"


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was over when it was submitted."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


class EagerRunner:
    """Calls the program op by op, and reads each step's tokens before the next is planned."""

    name: ClassVar[str] = "eager"
    depth: ClassVar[int] = 1
    offer: ClassVar[Offer] = Offer(
        has=frozenset(
            {
                Feature.HOST_CODE,
                Feature.TOKEN_HISTORY,
                Feature.FEATURES,
                Feature.DRAFT_CACHE,
                Feature.DRAFT_LOGITS,
                Feature.CPU,
                Feature.CUDA,
                Feature.WITHOUT_TRITON,
                Feature.OLD_CUDA,
            }
        ),
        lacks={Feature.TENSOR: _ONE_PROCESS, Feature.PIPELINE: _ONE_PROCESS},
    )

    def __init__(self, config: RunnerConfig, model: Decoder, count: Callable[[int], None] | None = None) -> None:
        """Binds a loaded model; use `build`. `count` as `load_weights` takes it."""
        self._device = config.device
        self._inference = torch.inference_mode()  # one for all steps: making it is a tenth of what a step costs here
        self._bound = Bound(config, model, config.sizes.max_num_seqs, count)
        self._bound.serve()

    @classmethod
    def footprint(cls, capture: CaptureOptions) -> int:
        """Nothing: it keeps no programs."""
        return 0

    @classmethod
    def build(cls, config: RunnerConfig, mesh: Mesh) -> Self:
        """Loads the target's weights and makes everything that lives beside them."""
        assert mesh == Mesh(), "the oracle refuses a split model for this runner"
        count = config.count_loaded()
        return cls(config, build_model(config, count), count)

    def submit(self, plan: StepPlan) -> Finished:
        """Runs the plan and reads its tokens."""
        with self._inference:
            return Finished(self._run(plan))

    def _run(self, plan: StepPlan) -> StepResult:
        table, results, guard = self._bound.table, self._bound.results, self._bound.guard
        table.update(plan)
        if not plan.rows:
            return StepResult(plan.step, (), ())
        num_logits = sum(row.num_drafts + 1 for row in plan.rows if row.ends_prompt)
        num_query = sum(row.num_tokens for row in plan.rows)
        rows = to_device(rows_of(plan), self._device)
        output = self._bound.run(rows, num_query, num_logits, table.processors(), table.drafts(plan))
        return guard.note(results.read(plan.step, results.columns(output)), guard.num_wrong)

    def reset(self) -> None:
        """Empties the slots."""
        self._bound.table.reset()

    def close(self) -> None:
        """Drops the model and the cache."""
        del self._bound
