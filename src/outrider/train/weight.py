"""Parameters that are trained: an allocator of them, and matrices that are stored apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from outrider.kernels.norm import RMS_NORM
from outrider.kernels.op import Op
from outrider.layers.parameter import Allocator
from outrider.layers.weight import TensorSlot, WeightSlot
from outrider.train.functional import multiply, rms_norm


class Separate:
    """Matrices multiplied side by side, each a parameter of its own for the optimizer."""

    def __init__(self, parts: Sequence[int], inputs: int, allocator: Allocator) -> None:
        self.parts = tuple(allocator.parameter(outputs, inputs) for outputs in parts)
        self.shape = (sum(parts), inputs)

    def slots(self, first: int, last: int) -> Mapping[str, WeightSlot]:
        start = 0
        for part in self.parts:
            if (start, start + len(part)) == (first, last):
                return {"weight": TensorSlot(part)}
            start += len(part)
        raise AssertionError(f"no matrix has outputs {first} to {last}")

    def multiply(self, x: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
        assert not upcast, "logits are read off the matrix itself"
        return multiply(x, self.parts, bias)


class TrainingAllocator(Allocator):
    """Makes parameters that ask for gradients, in float32, and computes norms so that autograd can follow."""

    @classmethod
    def new(cls) -> Self:
        """On the CPU."""
        return cls(torch.device("cpu"), torch.float32, torch.float32, Separate)

    def parameter(self, *shape: int) -> Tensor:
        return nn.Parameter(super().parameter(*shape))

    def kernel(self, op: Op[..., Any]) -> Callable[..., Any]:
        return rms_norm if op is RMS_NORM else super().kernel(op)
