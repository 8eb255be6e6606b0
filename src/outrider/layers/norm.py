"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from torch import Tensor

from outrider.kernels.norm import ADD_RMS_NORM, RMS_NORM
from outrider.layers.parameter import Allocator
from outrider.layers.weight import TensorSlot, WeightSlots


class RMSNorm:
    """weight * x / rms(x), computed in float32; alone, or after adding to the residual stream."""

    def __init__(self, size: int, eps: float, allocator: Allocator) -> None:
        self.weight = allocator.parameter(size)
        self.eps = eps
        self._norm = allocator.kernel(RMS_NORM)
        self._add_norm = allocator.kernel(ADD_RMS_NORM)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self._norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to `residual` in place; returns the sum, normalised."""
        return self._add_norm(x, residual, self.weight, self.eps)

    def slots(self, prefix: str) -> WeightSlots:
        return {f"{prefix}weight": TensorSlot(self.weight, is_norm=True)}
