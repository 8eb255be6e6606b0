"""The device's memory of each request, kept in step with the plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outrider.capability import Feature
from outrider.core.plan import Admission, StepPlan
from outrider.core.sampling import MAX_STOP_IDS
from outrider.draft.base import Drafter
from outrider.tensors import Slots
from outrider.verify.base import LogitsProcessor, Verifier

INT32_MAX = torch.iinfo(torch.int32).max


class SlotTable:
    """Applies releases, admissions and growth to `slots`, and knows which processors are in use."""

    def __init__(
        self,
        *,
        num_slots: int,
        max_len: int,
        max_blocks: int,
        drafter: Drafter,
        verifier: Verifier,
        processors: Sequence[LogitsProcessor],
        device: torch.device,
    ) -> None:
        def table(dtype: torch.dtype, *width: int, fill: float = 0) -> torch.Tensor:
            return torch.full((num_slots, *width), fill, dtype=dtype, device=device)

        int32, int64, float32 = torch.int32, torch.int64, torch.float32
        keeps_logits = drafter.gives_logits and Feature.DRAFT_LOGITS in verifier.needs
        drafts_wide = (drafter.num_drafts, drafter.target.vocab_size)
        self.slots = Slots(
            tokens=table(int64, max_len),
            length=table(int32),
            computed=table(int32),
            block_table=table(int32, max_blocks),
            temperature=table(float32),
            top_k=table(int32),
            top_p=table(float32, fill=1.0),
            min_p=table(float32),
            seed=table(int64),
            min_length=table(int32),
            barred=table(int64, 2 * MAX_STOP_IDS, fill=-1),
            draft_tokens=table(int64, drafter.num_drafts),
            draft_length=table(int32),
            draft_logits=table(float32, *drafts_wide) if keeps_logits else None,
        )
        self._drafter = drafter
        self._processors = tuple(processors)
        self._wanted_by: dict[int, tuple[int, ...]] = {}  # slot -> indices of the processors its request wants
        self._num_wanting = [0] * len(self._processors)
        self._drafted: set[int] = set()  # slots whose requests verify drafts

    def processors(self) -> tuple[LogitsProcessor, ...]:
        """Those that some request in a slot wants, in order."""
        pairs = zip(self._processors, self._num_wanting, strict=True)
        return tuple(processor for processor, wanting in pairs if wanting)

    def drafts(self, plan: StepPlan) -> bool:
        """Whether a row's request verifies drafts."""
        return any(row.slot in self._drafted for row in plan.rows)

    def update(self, plan: StepPlan) -> None:
        """Brings the tables to where the plan's rows can be run."""
        for slot in plan.release:
            self._release(slot)
        for admission in plan.admit:
            self._admit(admission)
        for slot, start, blocks in plan.grow:
            self.slots.block_table[slot, start : start + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def reset(self) -> None:
        """Empties every slot, as after an interrupted step, whatever part of an update that had done."""
        taken = list(self._wanted_by)
        self._wanted_by.clear()
        self._num_wanting = [0] * len(self._processors)
        self._drafted.clear()
        for slot in taken:
            self._drafter.release(slot)

    def _release(self, slot: int) -> None:
        for index in self._wanted_by.pop(slot):
            self._num_wanting[index] -= 1
        self._drafted.discard(slot)
        self._drafter.release(slot)

    def _admit(self, admission: Admission) -> None:
        slots, slot, sampling = self.slots, admission.slot, admission.sampling
        slots.tokens[slot, : len(admission.tokens)] = torch.tensor(admission.tokens)
        slots.length[slot] = len(admission.tokens)
        slots.computed[slot] = admission.num_cached
        slots.temperature[slot] = sampling.temperature
        slots.top_k[slot] = min(sampling.top_k, INT32_MAX)
        slots.top_p[slot] = sampling.top_p
        slots.min_p[slot] = sampling.min_p
        slots.seed[slot] = admission.seed
        slots.min_length[slot] = min(admission.num_prompt + sampling.min_tokens, INT32_MAX)
        slots.barred[slot] = -1
        slots.barred[slot, : len(admission.stop_ids)] = torch.tensor(admission.stop_ids, dtype=torch.int64)
        slots.draft_length[slot] = 0
        self._drafter.admit(slot, admission.tokens)  # first: a slot is taken once the drafter knows of it
        wanted = tuple(index for index, processor in enumerate(self._processors) if processor.wanted(sampling))
        self._wanted_by[slot] = wanted
        for index in wanted:
            self._num_wanting[index] += 1
        if admission.drafts:
            self._drafted.add(slot)
