"""How parameters are made: on a device, in a dtype, and matrices in a form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from outrider.kernels.op import Op
from outrider.layers.weight import Dense, Weight

P = ParamSpec("P")
R = TypeVar("R")


def activation_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What flows between layers: float32 on a CPU, whose kernels widen weights as they read them."""
    return torch.float32 if device.type == "cpu" else dtype


def dense(parts: Sequence[int], inputs: int, allocator: Allocator) -> Dense:
    """The form that a checkpoint's own tensors are, stacked."""
    return Dense(allocator.parameter(sum(parts), inputs))


@dataclass(frozen=True, slots=True)
class Allocator:
    """Makes parameters as NaN, so that one a checkpoint did not fill cannot pass unnoticed."""

    device: torch.device
    dtype: torch.dtype  # of the weights
    activation_dtype: torch.dtype  # of what flows between layers
    form: WeightForm = dense  # of matrices

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Allocator:
        """For weights of a dtype that a device is to serve."""
        return cls(device, dtype, activation_dtype(device, dtype))

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values: bfloat16 beside weights of it, which halves what a step reads of them."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else self.activation_dtype

    def parameter(self, *shape: int) -> Tensor:
        """A parameter to be filled from a checkpoint."""
        return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)

    def weight(self, parts: Sequence[int], inputs: int) -> Weight:
        """A matrix [sum of parts, in] in the form asked for."""
        return self.form(parts, inputs, self)

    def kernel(self, op: Op[P, R]) -> Callable[P, R]:
        """What computes an op for these parameters."""
        return op.on(self.device)


WeightForm = Callable[[Sequence[int], int, Allocator], Weight]
"""Makes a matrix: the outputs of each of the checkpoint's matrices that are stacked in it, and its inputs."""
