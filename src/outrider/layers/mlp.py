"""The gated feed-forward block (SwiGLU; Shazeer, 2020)."""

from __future__ import annotations

from torch import Tensor

from outrider.kernels.activation import SILU_MUL
from outrider.layers.linear import Linear
from outrider.layers.parameter import Allocator, Weights


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, allocator: Allocator) -> None:
        wide = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = Linear(hidden_size, wide, bias, allocator)
        self.down = Linear(intermediate_size, {"down_proj": hidden_size}, bias, allocator)
        self._silu_mul = SILU_MUL.on(allocator.device)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(self._silu_mul(self.gate_up(x)))

    def weights(self, prefix: str) -> Weights:
        return self.gate_up.weights(prefix) | self.down.weights(prefix)
