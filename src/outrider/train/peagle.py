"""P-EAGLE (arXiv 2602.01469): all depths in one pass, with a mask token and a learned hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from outrider.errors import OptionError
from outrider.train.attention import BLOCK, build_mask
from outrider.train.elements import Elements, drop, kept, label, segment_bounds, stratum_of
from outrider.train.functional import angles
from outrider.train.network import Head
from outrider.train.objective import Objective
from outrider.train.options import CommonOptions, PEagleOptions
from outrider.train.packing import EMPTY, Batch
from outrider.train.teacher import Truth


@dataclass(frozen=True, slots=True)
class _Segment:
    """One graph: the context up to the segment's right edge, its own deeper elements, and padding to whole blocks."""

    index: Tensor  # [N] of the elements it runs; padding repeats the first
    padding: Tensor  # [N] bool
    own: Tensor  # [M] of its N, those whose loss it counts
    num_context: int  # of depth 0, which come first


class PEagle(Objective):
    """Trains a head that drafts all tokens at once."""

    name: ClassVar[str] = "peagle"
    Options: ClassVar[type[CommonOptions]] = PEagleOptions
    architecture: ClassVar[str] = "PEagleSpeculator"
    parallel: ClassVar[bool] = True
    trains_embedding: ClassVar[bool] = True
    num_layers: ClassVar[int] = 4

    def __init__(
        self,
        head: Head,
        options: CommonOptions,
        device: torch.device,
        compiled: bool,
        stratum: int | None = None,  # anchors a stratum spans; left out: what suits the row length
    ) -> None:
        assert isinstance(options, PEagleOptions)
        self.num_depths, self._options = options.k_train, options
        super().__init__(head, options, device, compiled)
        assert head.config.mask_token_id is not None and head.mask_hidden is not None
        head.mask_hidden.requires_grad_(self.num_depths > 1)
        self._mask_token = torch.tensor(head.config.mask_token_id, device=device)
        self._stratum = stratum or stratum_of(options.max_length)
        self._segments = self._split(options.max_length // self._stratum, device)

    @classmethod
    def check(cls, options: CommonOptions) -> None:
        assert isinstance(options, PEagleOptions)
        if options.k_train < options.num_speculative_tokens:
            raise OptionError(
                f"k_train {options.k_train} is less than num_speculative_tokens {options.num_speculative_tokens}: "
                "the head would draft at depths it never saw; raise --k-train above K"
            )
        strata = options.max_length // stratum_of(options.max_length)
        if options.partitions > strata:
            raise OptionError(
                f"partitions {options.partitions} is more than the {strata} blocks of a row of {options.max_length} "
                "tokens: lower it, or make --max-length a larger multiple of 128"
            )

    def elements(self, batch: Batch, truth: Truth, uniform: Tensor) -> Elements:
        anchors = drop(batch, uniform, self._options.keep_rate, self.num_depths, self._stratum)
        return label(batch, truth.drafted, anchors)

    def weights(self, counts: Tensor) -> Tensor:
        """The mean over all elements, whatever their depth."""
        return (1 / counts.sum().clamp(min=1)).expand(self.num_depths)

    def run(self, batch: Batch, truth: Truth, elements: Elements, weights: Tensor, backward: bool) -> Tensor:
        sums = []
        for segment in self._segments:
            total, counted = self._segment(batch, truth, elements, weights, segment)
            if backward:
                total.backward()  # type: ignore[no-untyped-call]
            sums.append(counted)
        return torch.stack(sums).sum(0)

    def share(self, normed: Tensor, truth: Truth, elements: Elements, index: Tensor) -> Tensor | None:
        """`unreached_weight` for the drafts that no verifier would come to: an earlier one of their anchor is wrong."""
        if self._options.unreached_weight == 1:
            return None
        right = self.agreement(normed, truth, elements, index)
        anchor, depth = elements.anchor[:, index], elements.depth[:, index]
        num_rows, length = truth.drafted.shape
        at = depth * length + anchor
        table = torch.ones(num_rows, self.num_depths * length, dtype=torch.int64, device=at.device)
        chains = table.scatter(1, at, right.long()).view(num_rows, self.num_depths, length).cumprod(1).flatten(1)
        reached = (depth == 0) | chains.gather(1, (at - length).clamp(min=0)).bool()
        return torch.where(reached, 1.0, self._options.unreached_weight)

    def _segment(
        self, batch: Batch, truth: Truth, elements: Elements, weights: Tensor, segment: _Segment
    ) -> tuple[Tensor, Tensor]:
        head, context = self.head, segment.num_context
        rows, num_masked = len(batch.tokens), len(segment.index) - context
        features, dtype = truth.features[:, :context], truth.features.dtype
        following = batch.tokens.roll(-1, 1)[:, :context]
        assert head.mask_hidden is not None
        masked = head.embed(self._mask_token, dtype), head.project(head.mask_hidden.to(dtype))
        embeds = torch.cat((head.embed(following, dtype), masked[0].expand(rows, num_masked, -1)), dim=1)
        hidden = torch.cat((head.project(features), masked[1].expand(rows, num_masked, -1)), dim=1)
        labels = [x[:, segment.index] for x in (elements.document, elements.anchor, elements.depth, elements.position)]
        document = labels[0].masked_fill(segment.padding, EMPTY + 1)
        mask = build_mask(document, labels[1], labels[2])
        x = head.run(embeds, hidden, angles(self._rope, labels[3]), lambda _, q, k, v: self._attention(q, k, v, mask))
        return self.loss(x[:, segment.own], truth, elements, segment.index[segment.own], weights)

    def _split(self, num_strata: int, device: torch.device) -> list[_Segment]:
        """Where each segment's elements lie; the same in every batch, since strata keep the same numbers."""
        counts = kept(self._stratum, self._options.keep_rate, self.num_depths)
        bounds = segment_bounds(num_strata, self._options.partitions, sum(counts[1:]) / counts[0])
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + num_strata * count)
        made = []
        for left, right in pairwise(bounds):
            spans = [(0, right * counts[0])]
            spans += [
                (start + left * count, start + right * count)
                for start, count in zip(starts[1:-1], counts[1:], strict=True)
            ]
            index = torch.cat([torch.arange(*span) for span in spans])
            num_elements, num_context = len(index), right * counts[0]
            lacking = -num_elements % BLOCK if self._stratum % BLOCK == 0 else 0
            padded = torch.cat((index, index[:1].expand(lacking)))
            made.append(
                _Segment(
                    index=padded.to(device),
                    padding=(torch.arange(len(padded)) >= num_elements).to(device),
                    own=torch.arange(left * counts[0], num_elements).to(device),
                    num_context=num_context,
                )
            )
        return made
