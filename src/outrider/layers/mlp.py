"""The gated feed-forward block (SwiGLU; Shazeer, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from outrider.kernels.layer_by_ops import GatedMlp, LayerOps
from outrider.layers.linear import Linear
from outrider.layers.parameter import Allocator
from outrider.layers.weight import WeightSlots


@dataclass(frozen=True, slots=True)
class GatedMlpSpec:
    """down(silu(gate(x)) * up(x))."""

    width: int
    bias: bool = False

    def build(self, hidden_size: int, allocator: Allocator) -> GatedMLP:
        """The MLP with parameters that are still NaN."""
        return GatedMLP(self, hidden_size, allocator)


class GatedMLP:
    """Its parameters, gate and up in one product."""

    def __init__(self, spec: GatedMlpSpec, hidden_size: int, allocator: Allocator) -> None:
        self.gate_up = Linear(hidden_size, {"gate_proj": spec.width, "up_proj": spec.width}, spec.bias, allocator)
        self.down = Linear(spec.width, {"down_proj": hidden_size}, spec.bias, allocator)

    def apply(self, ops: LayerOps, x: Tensor, residual: Tensor) -> Tensor | None:
        gate_up, down = self.gate_up, self.down
        return GatedMlp(gate_up.weight, gate_up.bias, down.weight, down.bias).apply(ops, x, residual)

    def slots(self, prefix: str) -> WeightSlots:
        return self.gate_up.slots(prefix) | self.down.slots(prefix)
