"""EAGLE-3 (arXiv 2503.01840): one draft after another; trained by doing so, on its own hidden states."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from outrider.train.attention import Mask, build_mask, join_chain
from outrider.train.elements import Elements, every_anchor, label
from outrider.train.functional import angles
from outrider.train.network import Head
from outrider.train.objective import Objective
from outrider.train.options import CommonOptions, Eagle3Options
from outrider.train.packing import Batch
from outrider.train.teacher import Truth


class Eagle3(Objective):
    """Trains a head that drafts sequentially, by the training-time test.

    Step s of anchor i reads token i + s + 1 and what step s - 1 put out at the same anchor. It attends to step 0 of
    anchors up to i, and to the steps before it at its own.
    """

    name: ClassVar[str] = "eagle3"
    Options: ClassVar[type[CommonOptions]] = Eagle3Options
    architecture: ClassVar[str] = "Eagle3Speculator"
    parallel: ClassVar[bool] = False
    trains_embedding: ClassVar[bool] = False
    num_layers: ClassVar[int] = 1

    def __init__(
        self,
        head: Head,
        options: CommonOptions,
        device: torch.device,
        compiled: bool,
    ) -> None:
        assert isinstance(options, Eagle3Options)
        self.num_depths, self._step_decay = options.ttt_steps, options.step_decay
        super().__init__(head, options, device, compiled)
        self._join = torch.compile(join_chain) if compiled else join_chain  # for any number of steps

    def elements(self, batch: Batch, truth: Truth, uniform: Tensor) -> Elements:
        return label(batch, truth.drafted, [every_anchor(batch)] * self.num_depths)

    def weights(self, counts: Tensor) -> Tensor:
        """Each step's mean, that of step s times step_decay^s."""
        steps = torch.arange(self.num_depths, device=counts.device)
        return self._step_decay**steps / counts.clamp(min=1)

    def run(self, batch: Batch, truth: Truth, elements: Elements, weights: Tensor, backward: bool) -> Tensor:
        head, length = self.head, batch.tokens.shape[1]
        dtype, anchor = truth.features.dtype, every_anchor(batch)
        chain = _Chain(self, build_mask(batch.document, anchor, torch.zeros_like(anchor)))
        hidden, outputs = head.project(truth.features), []
        for step in range(self.num_depths):
            following = batch.tokens.roll(-1 - step, 1)
            turn = angles(self._rope, elements.position[:, step * length : (step + 1) * length])
            x = head.run(head.embed(following, dtype), hidden, turn, chain.attend)
            outputs.append(x)
            hidden = head.norm_output(x) if head.config.norm_output else x
        index = torch.arange(elements.start[-1], device=batch.tokens.device)
        total, sums = self.loss(torch.cat(outputs, dim=1), truth, elements, index, weights)
        if backward:
            total.backward()  # type: ignore[no-untyped-call]
        return sums


class _Chain:
    """Keys and values of the steps so far: attention over the context, joined with each anchor's own steps."""

    def __init__(self, objective: Eagle3, mask: Mask) -> None:
        self._objective, self._mask = objective, mask
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Hq, L, D] of the next step, whose keys and values are kept for those after it."""
        attention, steps = self._objective._attention, self._steps.setdefault(layer, [])
        steps.append((k, v))
        if len(steps) == 1:
            return attention(q, k, v, self._mask)
        out, weight = attention.with_weight(q, *steps[0], self._mask)
        keys, values = (torch.stack(own) for own in zip(*steps[1:], strict=True))
        return self._objective._join(q, out, weight, keys, values)
