"""Matrix products with the weight stored as checkpoints store it: [out, in]."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from outrider.kernels.linear import LINEAR
from outrider.layers.parameter import Allocator, Weights


class Linear:
    """One product that may be several of the checkpoint's, stacked: q, k and v; gate and up."""

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool, allocator: Allocator) -> None:
        """`parts` maps each projection's name in the checkpoint to its number of outputs, in order."""
        out_features = sum(parts.values())
        self.parts = dict(parts)
        self.weight = allocator.parameter(out_features, in_features)
        self.bias = allocator.parameter(out_features) if bias else None
        self._linear = LINEAR.on(allocator.device)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        out: Tensor = self._linear(x, self.weight, self.bias)
        return out

    def weights(self, prefix: str) -> Weights:
        """Each part's slice under `prefix` + its name."""
        found: Weights = {}
        start = 0
        for name, size in self.parts.items():
            found[f"{prefix}{name}.weight"] = self.weight[start : start + size]
            if self.bias is not None:
                found[f"{prefix}{name}.bias"] = self.bias[start : start + size]
            start += size
        return found
