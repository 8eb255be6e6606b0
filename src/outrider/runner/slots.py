"""The device's memory of each request, kept in step with the plans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.capability import Feature
from outrider.core.plan import Admission, Growth, StepPlan
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
        if plan.admit:
            self._admit(plan.admit)
        if plan.grow:
            self._grow(plan.grow)

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

    def _admit(self, admissions: Sequence[Admission]) -> None:
        """A few writes for all of them, none of which waits for the device."""
        slots = self.slots
        whole = [(one.slot, len(one.tokens), one.num_cached, *_whole_numbers(one)) for one in admissions]
        broken = [(one.sampling.temperature, one.sampling.top_p, one.sampling.min_p) for one in admissions]
        slot, length, computed, top_k, seed, min_length, *barred = self._send(np.array(whole, np.int64).T)
        temperature, top_p, min_p = self._send(np.array(broken, np.float32).T)
        for table, values in (
            (slots.length, length),
            (slots.computed, computed),
            (slots.top_k, top_k),
            (slots.seed, seed),
            (slots.min_length, min_length),
            (slots.barred, torch.stack(barred, dim=1)),
            (slots.temperature, temperature),
            (slots.top_p, top_p),
            (slots.min_p, min_p),
            (slots.draft_length, torch.zeros_like(length)),
        ):
            table.index_copy_(0, slot, values.to(table.dtype))
        width = slots.tokens.shape[1]
        place = np.concatenate([np.arange(len(one.tokens)) + one.slot * width for one in admissions])
        tokens = np.fromiter(chain.from_iterable(one.tokens for one in admissions), np.int64, len(place))
        slots.tokens.view(-1).index_copy_(0, *self._send(np.stack((place, tokens))))
        for admission in admissions:
            self._seat(admission)

    def _grow(self, growth: Sequence[Growth]) -> None:
        table = self.slots.block_table
        width = table.shape[1]
        place = [one.slot * width + one.start + index for one in growth for index in range(len(one.blocks))]
        blocks = [block for one in growth for block in one.blocks]
        at, values = self._send(np.array((place, blocks), np.int64))
        table.view(-1).index_copy_(0, at, values.int())

    def _send(self, array: NDArray[Any]) -> Tensor:
        return to_device(array, self.slots.length.device)

    def _seat(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        self._drafter.admit(slot, admission.tokens)  # first: a slot is taken once the drafter knows of it
        wanted = tuple(index for index, processor in enumerate(self._processors) if processor.wanted(sampling))
        self._wanted_by[slot] = wanted
        for index in wanted:
            self._num_wanting[index] += 1
        if admission.drafts:
            self._drafted.add(slot)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array; a CUDA device gets it in the order of its stream, and nobody waits."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _whole_numbers(admission: Admission) -> tuple[int, ...]:
    """top_k, seed, min_length, and the tokens that are barred below that length."""
    sampling, stop_ids = admission.sampling, admission.stop_ids
    shortest = min(admission.num_prompt + sampling.min_tokens, INT32_MAX)
    padding = (-1,) * (2 * MAX_STOP_IDS - len(stop_ids))
    return (min(sampling.top_k, INT32_MAX), admission.seed, shortest, *stop_ids, *padding)
