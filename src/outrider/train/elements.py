"""The elements of a batch: which (anchor, depth) are trained, where they stand, and what each is to match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from outrider.train.packing import EMPTY, Batch

STRATUM = 128
"""Neighbouring anchors of which every depth keeps the same number, so that no shape depends on chance."""


@dataclass(frozen=True, slots=True)
class Elements:
    """Labels of a batch's elements, depth after depth, anchors ascending within each. All [B, N] but `start`."""

    anchor: Tensor  # int64, place in the row
    depth: Tensor  # int64
    document: Tensor  # int64
    position: Tensor  # int64, anchor's position in its document + depth
    row: Tensor  # int64, of `Truth.logits`: the target's distribution at anchor + depth + 1
    trained: Tensor  # bool, whether that exists in the document, follows its prompt, and can be drafted
    start: tuple[int, ...]  # where each depth starts, and N

    def counts(self) -> Tensor:
        """[depths] trained elements of each depth, float32."""
        spans = pairwise(self.start)
        return torch.stack([self.trained[:, first:last].sum() for first, last in spans]).float()


def label(batch: Batch, drafted: Tensor, anchors: Sequence[Tensor]) -> Elements:
    """The labels for each depth's anchors, [B, n_depth] each; `drafted` [B, L] as in `Truth`."""
    num_rows, length = batch.tokens.shape
    anchor = torch.cat(list(anchors), dim=1)
    start = [0]
    for chosen in anchors:
        start.append(start[-1] + chosen.shape[1])
    depth = torch.cat([torch.full_like(chosen, index) for index, chosen in enumerate(anchors)], dim=1)
    drafted_at = (anchor + depth + 1).clamp(max=length - 1)
    document = batch.document.gather(1, anchor)
    follows = batch.remaining.gather(1, anchor) >= depth + 1
    past_prompt = batch.untrained.gather(1, anchor) <= depth + 1
    return Elements(
        anchor=anchor,
        depth=depth,
        document=document,
        position=batch.position.gather(1, anchor) + depth,
        row=drafted_at + length * torch.arange(num_rows, device=anchor.device).unsqueeze(1),
        trained=follows & past_prompt & (document != EMPTY) & drafted.gather(1, drafted_at),
        start=tuple(start),
    )


def every_anchor(batch: Batch) -> Tensor:
    """[B, L]: all places of all rows."""
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)


def stratum_of(length: int, wanted: int = STRATUM) -> int:
    """The width of a stratum for rows of a length: the row itself where the usual width does not divide it."""
    return length if length % wanted else wanted


def kept(width: int, keep_rate: float, num_depths: int) -> list[int]:
    """Elements that each depth keeps of a stratum: all, then about width * keep_rate^depth."""
    return [max(1, round(width * keep_rate**depth)) for depth in range(num_depths)]


def drop(batch: Batch, uniform: Tensor, keep_rate: float, num_depths: int, width: int) -> list[Tensor]:
    """Conditional drop-token sampling (PARD, arXiv 2504.18583): the anchors of each depth, nested.

    `uniform` [B, L] are random numbers of [0, 1). Within each stratum of `width` anchors a depth keeps the first
    few of one random order, so an anchor at a depth is there at every smaller one. Anchors that no depth can learn
    from come last.
    """
    useful = (batch.remaining >= 2) & (batch.untrained <= num_depths) & (batch.document != EMPTY)
    key = torch.where(useful, uniform, 1 + uniform).view(len(uniform), -1, width)
    order = key.argsort(dim=-1)
    first = torch.arange(0, uniform.shape[1], width, device=uniform.device).view(-1, 1)
    return [(order[..., :count].sort(dim=-1).values + first).flatten(1) for count in kept(width, keep_rate, num_depths)]


def segment_bounds(num_strata: int, num_segments: int, deeper: float) -> list[int]:
    """Strata at which the segments of a row end, such that each one's graph holds about as many elements.

    A graph holds the context up to the segment's right edge, and `deeper` times its own anchors: if e is the edge
    as a share of the row, e[s] = (m + deeper * e[s-1]) / (1 + deeper) for the same m in all, and the last is 1.
    """
    shrink = deeper / (1 + deeper)
    edges = [(1 - shrink ** (index + 1)) / (1 - shrink**num_segments) for index in range(num_segments)]
    bounds = [0]
    for index, edge in enumerate(edges):
        lowest, highest = bounds[-1] + 1, num_strata - (num_segments - index - 1)
        bounds.append(min(max(round(edge * num_strata), lowest), highest))
    return bounds
