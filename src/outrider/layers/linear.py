"""Matrix products whose weight may be several of the checkpoint's, stacked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from outrider.layers.parameter import Allocator
from outrider.layers.weight import TensorSlot, WeightSlots


class Linear:
    """One product that may be several of the checkpoint's, stacked: q, k and v; gate and up."""

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool, allocator: Allocator) -> None:
        """`parts` maps each projection's name in the checkpoint to its number of outputs, in order."""
        self.parts = dict(parts)
        self.weight = allocator.weight(list(parts.values()), in_features)
        self.bias = allocator.parameter(sum(parts.values())) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.weight.multiply(x, self.bias)

    def slots(self, prefix: str) -> WeightSlots:
        """Each part's slice under `prefix` + its name."""
        found: WeightSlots = {}
        start = 0
        for name, size in self.parts.items():
            for what, slot in self.weight.slots(start, start + size).items():
                found[f"{prefix}{name}.{what}"] = slot
            if self.bias is not None:
                found[f"{prefix}{name}.bias"] = TensorSlot(self.bias[start : start + size])
            start += size
        return found
