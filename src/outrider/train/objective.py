"""What a training method is: how elements are chosen, how the head is run over them, and what the loss weighs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from outrider.train.attention import Attention
from outrider.train.elements import Elements
from outrider.train.loss import Divergence
from outrider.train.network import Head
from outrider.train.options import CommonOptions
from outrider.train.packing import Batch
from outrider.train.teacher import Truth


class Objective(ABC):
    """One method's way to train a head. A method adds a file with one of these and a line in the registry."""

    Options: ClassVar[type[CommonOptions]]
    name: ClassVar[str]  # as `speculators_model_type` says it
    architecture: ClassVar[str]  # as the speculators format names the class
    parallel: ClassVar[bool]  # whether all drafts come out of one pass: the head has a mask token and hidden state
    trains_embedding: ClassVar[bool]  # unless the options say otherwise
    num_layers: ClassVar[int]  # unless the options say otherwise

    num_depths: int
    """Drafts ahead that are trained."""

    def __init__(
        self,
        head: Head,
        options: CommonOptions,
        device: torch.device,
        compiled: bool,
    ) -> None:
        """A subclass sets `num_depths` first: the rope table is as long as the deepest draft needs."""
        self.head = head
        config = head.config.layer
        positions = options.max_length + self.num_depths + 1
        self._rope = config.rope.table(positions, config.head_dim, device)
        self._attention = Attention(device)
        self._divergence = Divergence(compiled)

    @classmethod  # noqa: B027 - a hook, not a duty
    def check(cls, options: CommonOptions) -> None:
        """OptionError for what this method cannot do; before anything is loaded."""

    @abstractmethod
    def elements(self, batch: Batch, truth: Truth, uniform: Tensor) -> Elements:
        """What is trained of a batch. `uniform` [B, L] are this step's random numbers."""

    @abstractmethod
    def weights(self, counts: Tensor) -> Tensor:
        """[depths] the weight of an element's loss at each depth, from the trained ones of each over all processes."""

    @abstractmethod
    def run(self, batch: Batch, truth: Truth, elements: Elements, weights: Tensor, backward: bool) -> Tensor:
        """[3, depths]: sums of loss, agreement and number of trained elements, without gradients.

        With `backward`, gradients of the weighted loss are added to the head's; no graph is left either way.
        """

    def loss(
        self, hidden: Tensor, truth: Truth, elements: Elements, index: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss of elements `index` [N], whose streams are `hidden` [B, N, H], and its sums [3, depths]."""
        depth, trained = elements.depth[:, index].flatten(), elements.trained[:, index].flatten()
        normed = self.head.norm_output(hidden).flatten(0, 1)
        weight, row = self.head.lm_head.weight, elements.row[:, index].flatten()
        share = self.share(normed, truth, elements, index)
        scale = weights[depth] * trained * (1 if share is None else share.flatten())
        total, divergence, agrees = self._divergence(normed, weight, truth.logits, row, scale)
        counted = torch.stack((divergence * trained, (agrees & trained).to(divergence), trained.to(divergence)))
        sums = torch.zeros(3, self.num_depths, dtype=divergence.dtype, device=divergence.device)
        return total, sums.index_add_(1, depth, counted)

    def share(self, normed: Tensor, truth: Truth, elements: Elements, index: Tensor) -> Tensor | None:
        """[B, N] further weights of elements `index`, whose normed streams are `normed` [B * N, H]; None: 1 each."""
        return None

    @torch.no_grad()
    def agreement(self, normed: Tensor, truth: Truth, elements: Elements, index: Tensor) -> Tensor:
        """[B, N] bool, whether the most likely tokens of draft and target are the same."""
        row = elements.row[:, index]
        weight, scale = self.head.lm_head.weight, torch.zeros_like(row.flatten(), dtype=normed.dtype)
        return self._divergence(normed, weight, truth.logits, row.flatten(), scale)[2].view_as(row)
