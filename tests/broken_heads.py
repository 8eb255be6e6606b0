"""Draft heads run in the ways in which other engines got them wrong. Nothing crashes: only acceptance falls.

Each stands in for a method of `METHODS`, or is named as `broken_heads:Class`, so that a check can be shown to notice
it: by name and options it is the right one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from outrider.draft.base import DraftContext
from outrider.draft.eagle.base import HeadDrafter, HeadRows
from outrider.draft.eagle.eagle3 import Eagle3
from outrider.draft.eagle.peagle import PEagle
from outrider.tensors import Draft, PagedRows


def masked(rows: HeadRows, context: DraftContext) -> Tensor:
    """[rows] bool, which are mask rows."""
    return rows.source == context.batch.input_ids.shape[0]


class Healthy(PEagle):
    """Run as it should be: what shows that the others fail for their fault, and not for standing in."""


class NoRerun(PEagle):
    """Takes what is cached for a prefix as it is, though its last row was made for another next token."""

    rerun: ClassVar[int] = 0


class Sequential(PEagle):
    """A P-EAGLE head run one token after another, as vLLM's second runner did."""

    propose = Eagle3.propose
    _singles = Eagle3._singles


class TapsOffByOne(PEagle):
    """Reads what enters the layer before each auxiliary one."""

    def aux_layer_ids(self) -> tuple[int, ...]:
        return tuple(tap - 1 for tap in HeadDrafter.aux_layer_ids(self))


class SequentialTapsOffByOne(Eagle3):
    """The same for EAGLE-3."""

    aux_layer_ids = TapsOffByOne.aux_layer_ids


class Stale(PEagle):
    """Mask rows take the feature of the target's last query token, a rejected draft's say."""

    def rows(self, context: DraftContext, num_masks: int) -> HeadRows:
        rows = super().rows(context, num_masks)
        each = torch.arange(rows.source.shape[0], dtype=torch.int32)
        owner = torch.searchsorted(rows.batch.rows.query_start[1:], each, right=True).clamp(
            max=context.batch.slot.shape[0] - 1
        )
        last = context.batch.rows.query_start[1:][owner].long() - 1
        return replace(rows, source=torch.where(masked(rows, context), last, rows.source))


class OneBehind(PEagle):
    """Mask rows stand one position too early."""

    def rows(self, context: DraftContext, num_masks: int) -> HeadRows:
        rows = super().rows(context, num_masks)
        positions = rows.batch.rows.positions - masked(rows, context).long()
        return replace(rows, batch=replace(rows.batch, rows=rows.batch.rows._replace(positions=positions)))


class Unshifted(PEagle):
    """A row holds the token of its position, not the one after it."""

    def rows(self, context: DraftContext, num_masks: int) -> HeadRows:
        rows = super().rows(context, num_masks)
        slot = context.batch.slot.repeat_interleave(rows.batch.rows.query_start.diff())
        slot = torch.nn.functional.pad(slot, (0, rows.source.shape[0] - slot.shape[0]))
        there = context.slots.tokens[slot, rows.batch.rows.positions]
        ids = torch.where(masked(rows, context), rows.batch.input_ids, there)
        return replace(rows, batch=replace(rows.batch, input_ids=ids))


class Blind(PEagle):
    """Mask rows see each other, and neither the context nor the bonus row."""

    def propose(self, context: DraftContext) -> Draft:
        network = self.network
        real = getattr(network, "_stood_for", network)  # not the one that a test watches

        def call(ids, hidden, batch, cache):  # type: ignore[no-untyped-def]
            alone = torch.nonzero(source == context.batch.input_ids.shape[0])[:, 0]
            fed = hidden[alone]
            normed, stream = network(ids, hidden, batch, cache)
            size = context.batch.slot.shape[0]
            owner = torch.searchsorted(batch.rows.query_start[1:], alone.int(), right=True)
            count = torch.bincount(owner, minlength=size)
            start = torch.nn.functional.pad(count.cumsum(0), (1, 0))
            place = torch.arange(len(alone)) - start[owner]
            block = torch.arange(size, dtype=torch.int32)[:, None].expand_as(batch.rows.block_table).contiguous()
            slots = owner * self.target.sizes.block_size + place
            only = replace(batch, rows=PagedRows(place, slots, block, start.int(), count.int()))
            if len(alone):
                fresh = self.cache_layouts()[0].allocate(size, self.target.device)
                normed[alone] = real(ids[alone], fed, only, fresh)[0]
            return normed, stream

        source = super().rows(context, self.num_drafts - 1).source
        self.network = Stand(network, call)  # type: ignore[assignment]
        try:
            return super().propose(context)
        finally:
            self.network = network


class Stand:
    """Something with another way of being called."""

    def __init__(self, stood_for, call) -> None:  # type: ignore[no-untyped-def]
        self._stood_for, self._call = stood_for, call

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._stood_for, name)

    def __call__(self, *arguments):  # type: ignore[no-untyped-def]
        return self._call(*arguments)


BROKEN: dict[str, type[HeadDrafter]] = {
    broken.__name__: broken for broken in (Sequential, TapsOffByOne, Stale, OneBehind, Unshifted, Blind)
}
"""What stands in for P-EAGLE, by name."""
