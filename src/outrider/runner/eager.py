"""The runner that calls the step program: any device, any part, results at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Self

import numpy as np
import torch

from outrider.capability import Feature, Offer
from outrider.core.plan import Row, StepPlan, StepResult
from outrider.kernels.step_inputs import ASSEMBLE, load_draft
from outrider.models.decoder import Decoder
from outrider.parallel.mesh import Mesh
from outrider.runner.base import RunnerConfig
from outrider.runner.build import build_drafter, build_model
from outrider.runner.slots import SlotTable, to_device
from outrider.runner.step import StepProgram
from outrider.tensors import StepBatch

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

    @classmethod
    def footprint(cls, capture_sizes: Sequence[int], num_drafts: int) -> int:
        """Nothing: it keeps no programs."""
        return 0

    def __init__(self, config: RunnerConfig, model: Decoder, progress: Callable[[int], None] | None = None) -> None:
        """Binds a loaded model to a cache, a drafter and slots; use `build`. `progress` as `load_weights` takes it."""
        self._config = config
        cache = model.cache_layout(config.block_size).allocate(config.memory.num_blocks, config.device)
        drafter = build_drafter(config, model, progress)
        self._table = SlotTable(
            num_slots=config.max_num_seqs,
            max_len=config.max_model_len,
            max_blocks=-(-config.max_model_len // config.block_size),
            drafter=drafter,
            verifier=config.verifier,
            processors=config.processors,
            device=config.device,
        )
        self._program = StepProgram(model, cache, drafter, config.verifier, config.device)
        self._assemble = ASSEMBLE.on(config.device)

    @classmethod
    def build(cls, config: RunnerConfig, mesh: Mesh) -> Self:
        """Loads the target's weights and makes everything that lives beside them."""
        assert mesh == Mesh(), "the oracle refuses a split model for this runner"
        count = config.count_loaded()
        return cls(config, build_model(config, count), count)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Finished:
        """Runs the plan and reads its tokens."""
        self._table.update(plan)
        if not plan.rows:
            return Finished(StepResult(plan.step, (), ()))
        slots = self._table.slots
        batch = self._batch(plan)
        draft = load_draft(slots, batch)
        verdict, proposed = self._program(batch, draft, slots, self._table.processors(), self._table.drafts(plan))
        counts = verdict.count.tolist()
        tokens = tuple(tuple(row[:count]) for row, count in zip(verdict.tokens.tolist(), counts, strict=True))
        num_drafted = (0,) * len(tokens) if proposed is None else tuple(proposed.length.tolist())
        return Finished(StepResult(plan.step, tokens, num_drafted))

    def _batch(self, plan: StepPlan) -> StepBatch:
        num_logits = sum(row.num_drafts + 1 for row in plan.rows if row.ends_prompt)
        num_query = sum(row.num_tokens for row in plan.rows)
        numbers = np.fromiter(chain.from_iterable(plan.rows), np.int64).reshape(-1, len(Row._fields))
        columns = to_device(numbers, self._config.device).unbind(1)
        batch: StepBatch = self._assemble(self._table.slots, *columns, num_query, num_logits, self._config.block_size)
        return batch

    def reset(self) -> None:
        """Empties the slots."""
        self._table.reset()

    def close(self) -> None:
        """Drops the model and the cache."""
        del self._program, self._table
