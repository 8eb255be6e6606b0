"""The device's memory of each request, kept in step with the plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.core.plan import Admission, Growth, StepPlan
from outrider.core.sizes import Sizes
from outrider.runner.drafter_guard import DrafterGuard
from outrider.runner.processor_tables import NUMPY, ProcessorTables
from outrider.tensors import Slots
from outrider.verify.base import ActiveProcessor, LogitsProcessor


class SlotTable:
    """Applies releases, admissions and growth to the slots, and knows which processors are in use.

    It keeps what every step, the verifier and the drafter read (`slots`), and the tables that each logits processor
    declares. A row of such a table holds its `fill` while the request in the slot does not want the processor.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        sizes: Sizes,
        drafter: DrafterGuard,
        processors: Sequence[LogitsProcessor],
        device: torch.device,
    ) -> None:
        def table(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros(num_slots, *width, dtype=dtype, device=device)

        int32, int64, float32 = torch.int32, torch.int64, torch.float32
        vocab_size, num_drafts = drafter.drafter.target.vocab_size, drafter.drafter.num_drafts
        self.slots = Slots(
            tokens=table(int64, sizes.max_model_len),
            length=table(int32),
            computed=table(int32),
            block_table=table(int32, sizes.max_blocks),
            temperature=table(float32),
            seed=table(int64),
            draft_tokens=table(int64, num_drafts),
            draft_length=table(int32),
            draft_logits=table(float32, num_drafts, vocab_size) if drafter.keeps_logits else None,
        )
        self._tables = [ProcessorTables(processor, num_slots, vocab_size, device) for processor in processors]
        self.all_processors = tuple(tables.active for tables in self._tables)
        """Every processor with its state, in order."""
        self._drafter, self._device = drafter, device
        self._wanted_by: dict[int, tuple[int, ...]] = {}  # slot -> indices of the processors its request wants
        self._num_wanting = [0] * len(self.all_processors)
        self._drafted: set[int] = set()  # slots whose requests verify drafts

    def processors(self) -> tuple[ActiveProcessor, ...]:
        """Those that some request in a slot wants, in order."""
        pairs = zip(self.all_processors, self._num_wanting, strict=True)
        return tuple(processor for processor, wanting in pairs if wanting)

    def drafts(self, plan: StepPlan) -> bool:
        """Whether a row's request verifies drafts."""
        if self._drafter.stopped:
            return any(row.num_drafts for row in plan.rows)  # those that were planned before
        return bool(self._drafted) and any(row.slot in self._drafted for row in plan.rows)

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
        taken = dict(self._wanted_by)
        self._wanted_by.clear()
        self._num_wanting = [0] * len(self.all_processors)
        self._drafted.clear()
        for slot, wanted in taken.items():
            self._notify_release(slot, wanted)

    def _release(self, slot: int) -> None:
        wanted = self._wanted_by.pop(slot)
        for index in wanted:
            self._num_wanting[index] -= 1
        self._drafted.discard(slot)
        self._notify_release(slot, wanted)

    def _notify_release(self, slot: int, wanted: Sequence[int]) -> None:
        self._drafter.release(slot)
        for index in wanted:
            self._tables[index].release(slot)

    def _admit(self, admissions: Sequence[Admission]) -> None:
        """One copy to the device for all of them, and a write for each table; none waits for the device."""
        slots = self.slots
        # First: whatever is interrupted later, `reset` then releases what was admitted.
        for admission in admissions:
            self._register(admission)
        width = slots.tokens.shape[1]
        at = np.concatenate([np.arange(len(one.tokens)) + one.slot * width for one in admissions])
        tokens = np.fromiter(chain.from_iterable(one.tokens for one in admissions), np.int64, len(at))
        columns: dict[str, NDArray[Any]] = {
            "slot": np.array([one.slot for one in admissions], np.int64),
            "length": np.array([len(one.tokens) for one in admissions], np.int32),
            "computed": np.array([one.num_cached for one in admissions], np.int32),
            "temperature": np.array([one.sampling.temperature for one in admissions], np.float32),
            "seed": np.array([one.seed for one in admissions], np.int64),
            "draft_length": np.zeros(len(admissions), np.int32),
            "at": at,
            "tokens": tokens,
        }
        for index, tables in enumerate(self._tables):
            wanting = [one for one in admissions if index in self._wanted_by[one.slot]]
            columns |= tables.columns(admissions, wanting)
        sent = self._send(columns)
        for name in ("length", "computed", "temperature", "seed", "draft_length"):
            getattr(slots, name).index_copy_(0, sent["slot"], sent[name])
        slots.tokens.view(-1).index_copy_(0, sent["at"], sent["tokens"])
        for tables in self._tables:
            tables.write(sent)

    def _grow(self, growth: Sequence[Growth]) -> None:
        table = self.slots.block_table
        width = table.shape[1]
        at = [one.slot * width + one.start + index for one in growth for index in range(len(one.blocks))]
        blocks = [block for one in growth for block in one.blocks]
        sent = to_device(np.array((at, blocks), np.int64), self._device)
        table.view(-1).index_copy_(0, sent[0], sent[1].int())

    def _send(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The columns on the device, by name, with one copy for all of them."""
        # The widest types come first, so that each column begins where a number of its type may.
        names = sorted(columns, key=lambda name: -columns[name].itemsize)
        packed = np.concatenate([np.ascontiguousarray(columns[name]).reshape(-1).view(np.uint8) for name in names])
        buffer, start = to_device(packed, self._device), 0
        sent = {}
        for name in names:
            column = columns[name]
            cells = buffer[start : start + column.nbytes]
            sent[name] = cells.view(_TORCH[column.dtype]).view(column.shape)
            start += column.nbytes
        return sent

    def _register(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        pairs = enumerate(self.all_processors)
        wanted = tuple(index for index, (processor, _) in pairs if processor.wanted(sampling))
        self._wanted_by[slot] = wanted
        for index in wanted:
            self._num_wanting[index] += 1
        self._drafter.admit(slot, admission.tokens)
        if admission.drafts:
            self._drafted.add(slot)


_TORCH = {numpy: dtype for dtype, numpy in NUMPY.items()}


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array; a CUDA device gets it in the order of its stream, and nobody waits."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
