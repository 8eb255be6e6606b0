"""What every runner builds of a resolved configuration: model, cache, drafter, slots and step program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from outrider.capability import Feature
from outrider.core.plan import Row, StepPlan
from outrider.draft.base import Drafter, TargetParts
from outrider.errors import OptionError
from outrider.kernels.step_inputs import ASSEMBLE, load_draft
from outrider.layers.parameter import Allocator
from outrider.load.target import load_target
from outrider.models.decoder import Decoder
from outrider.runner.base import RunnerConfig
from outrider.runner.drafter_guard import DrafterGuard, building
from outrider.runner.processor_guard import GuardedProcessor, guarded
from outrider.runner.results import ResultLayout
from outrider.runner.slots import SlotTable
from outrider.runner.step import Mark, StepOutput, StepProgram, unmarked
from outrider.verify.base import ActiveProcessor


class Bound:
    """A loaded model bound to its cache, a drafter, the slots of requests and the step program."""

    def __init__(
        self,
        config: RunnerConfig,
        model: Decoder,
        num_slots: int,
        count: Callable[[int], None] | None = None,  # called with the bytes of each weight loaded
    ) -> None:
        device = config.device
        cache = model.cache_layout(config.sizes.block_size).allocate(config.memory.num_blocks, device)
        with building(config.drafter.name):
            drafter = _build_drafter(config, model, count)
        self.guard = DrafterGuard(drafter, config.verifier)
        self._processors = guarded(config.processors)
        self.table = SlotTable(
            num_slots=num_slots,
            sizes=config.sizes,
            drafter=self.guard,
            processors=self._processors,
            device=device,
        )
        self.program = StepProgram(model, cache, self.guard, config.verifier, device)
        declared = [column for part in (config.verifier, *config.processors) for column in part.columns]
        self.results = ResultLayout(drafter.num_drafts, declared, device)
        self.num_drafts = drafter.num_drafts
        self._assemble, self._block_size = ASSEMBLE.on(device), config.sizes.block_size

    def serve(self) -> None:
        """The runner is built: from now on what a user's drafter or processor raises harms no other request."""
        self.guard.serve()
        for processor in self._processors:
            if isinstance(processor, GuardedProcessor):
                processor.serve()

    def run(
        self,
        rows: Tensor,  # [B, 4] int64, the fields of `core.plan.Row`
        num_query: int,
        num_logits: int,
        processors: Sequence[ActiveProcessor],
        drafting: bool,
        mark: Mark = unmarked,
    ) -> StepOutput:
        """Runs the step program on rows of a plan, which `table` has been brought up to."""
        slots = self.table.slots
        batch = self._assemble(slots, rows, num_query, num_logits, self._block_size)
        draft = load_draft(slots, batch)
        mark("inputs")
        return self.program(batch, draft, slots, processors, drafting, mark)


def rows_of(plan: StepPlan) -> NDArray[np.int64]:
    """The plan's rows as numbers, [B, 4], the fields of `Row`."""
    numbers = chain.from_iterable(plan.rows)
    width = len(Row._fields)
    return np.fromiter(numbers, np.int64, width * len(plan.rows)).reshape(-1, width)


def build_model(config: RunnerConfig, count: Callable[[int], None]) -> Decoder:
    """The target with its weights, loaded or random. `count` is called with the bytes of each weight filled."""
    model = config.model(config.model_config, config.sizes.max_model_len, Allocator.on(config.device, config.dtype))

    def ignores(name: str) -> bool:
        return model.ignores(name) or config.drafter.reads_from_target(name, config.target)

    if config.directory is None:
        model.fill_dummy(config.seed)
    else:
        load_target(config.directory, model, ignores, count)
    return model


def _build_drafter(config: RunnerConfig, model: Decoder, count: Callable[[int], None] | None) -> Drafter:
    """The drafter, given its weights and its own layers of the cache.

    OptionError if it asks for what its `needs` do not name, which the oracle and the scheduler go by, or for more
    memory than it announced.
    """
    drafter = config.drafter(config.draft_options, config.target)
    layouts = drafter.cache_layouts()
    for asked, feature in ((layouts, Feature.DRAFT_CACHE), (drafter.aux_layer_ids(), Feature.FEATURES)):
        if asked and feature not in drafter.needs:
            raise OptionError(f"drafter {drafter.name} asks for {feature.name}: its needs must name that feature")
    planned = config.memory.bytes_per_block - model.cache_layout(config.sizes.block_size).bytes_per_block
    asked_for = sum(layout.bytes_per_block for layout in layouts)
    if asked_for != planned:
        raise OptionError(
            f"drafter {drafter.name} keeps {asked_for} bytes in each block of the cache, but its footprint says "
            f"per_block={planned}: they must agree"
        )
    caches = [layout.allocate(config.memory.num_blocks, config.device) for layout in layouts]
    dummy_seed = config.seed if config.directory is None else None
    drafter.prepare(TargetParts(model.embedding, model.head), caches, dummy_seed, count)
    return drafter
