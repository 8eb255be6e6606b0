"""A weight as an object: how it is stored, which of a checkpoint's tensors fill it, and how it is multiplied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from outrider.errors import CheckpointError
from outrider.kernels.linear import LINEAR


class WeightSlot(Protocol):
    """What one tensor of a checkpoint fills."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the checkpoint's tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes that are held for it."""

    @property
    def nbytes_read(self) -> int:
        """Of these, what one step reads, however many tokens it has."""

    def fill(self, tensor: Tensor) -> None:
        """Takes the checkpoint's tensor, cast or cut as needed.

        Raises CheckpointError, whose text follows the tensor's name.
        """

    def fill_dummy(self, generator: torch.Generator) -> None:
        """Values of a plausible size, for benchmarks without a checkpoint."""


WeightSlots = dict[str, WeightSlot]
"""The checkpoint's name of a tensor -> what it fills."""


class Weight(Protocol):
    """A matrix [out, in] in some form. Several projections of the checkpoint may be stacked along `out`."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""

    def slots(self, first: int, last: int) -> Mapping[str, WeightSlot]:
        """What outputs first:last are filled from, by the end of the tensor's name, as "weight" or "weight_scale"."""

    def multiply(self, x: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
        """[T, in] -> [T, out], in x's dtype, or in float32 if `upcast`."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A parameter, or a slice of one, stored as the checkpoint has it but for the dtype."""

    tensor: Tensor
    is_norm: bool = False  # without a checkpoint it is ones, and not drawn
    is_read: bool = True  # whether a step reads all of it, and not a few rows

    @property
    def shape(self) -> Sequence[int]:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def nbytes_read(self) -> int:
        return self.nbytes if self.is_read else 0

    def fill(self, tensor: Tensor) -> None:
        check_shape(self, tensor)
        if not tensor.is_floating_point():
            raise CheckpointError(f"is {tensor.dtype}: quantised weights are not supported")
        self.tensor.copy_(tensor)

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.tensor.fill_(1.0) if self.is_norm else self.tensor.normal_(0.0, 0.02, generator=generator)


def check_shape(slot: WeightSlot, tensor: Tensor) -> None:
    """CheckpointError unless the checkpoint's tensor has the shape that the slot expects."""
    if list(tensor.shape) != list(slot.shape):
        raise CheckpointError(f"has shape {list(tensor.shape)}, the config promises {list(slot.shape)}")


class Dense:
    """A matrix as one tensor of floating-point numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._linear = LINEAR.on(tensor.device)

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.tensor.shape
        return outputs, inputs

    def slots(self, first: int, last: int) -> Mapping[str, WeightSlot]:
        return {"weight": TensorSlot(self.tensor[first:last])}

    def multiply(self, x: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
        return self._linear(x, self.tensor, bias, upcast)


def dense_tensor(weight: Weight) -> Tensor:
    """The tensor [out, in] of a dense weight."""
    assert isinstance(weight, Dense), f"{type(weight).__name__} is not dense"
    return weight.tensor


def num_parameters(slots: Mapping[str, WeightSlot]) -> int:
    """Numbers that a checkpoint holds for these."""
    return sum(math.prod(slot.shape) for slot in slots.values())


def fill_dummy(slots: Mapping[str, WeightSlot], device: torch.device, seed: int) -> None:
    """Random weights, for benchmarks without a checkpoint."""
    generator = torch.Generator(device).manual_seed(seed)
    for slot in slots.values():
        slot.fill_dummy(generator)
