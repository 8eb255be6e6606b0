"""How parameters are made: on a device, in a dtype, and matrices in a form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.layers.weight import Dense, Weight


def activation_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What flows between layers: float32 on a CPU, whose kernels widen weights as they read them."""
    return torch.float32 if device.type == "cpu" else dtype


def dense(outputs: int, inputs: int, allocator: Allocator) -> Dense:
    """The form that a checkpoint's own tensor is."""
    return Dense(allocator.parameter(outputs, inputs))


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

    def weight(self, outputs: int, inputs: int) -> Weight:
        """A matrix [out, in] in the form asked for."""
        return self.form(outputs, inputs, self)


WeightForm = Callable[[int, int, Allocator], Weight]
"""Makes a matrix of so many outputs and inputs."""
