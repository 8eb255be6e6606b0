"""A model family of one's own: a Llama whose MLP is two matrices with a squared ReLU between them (So et al., 2021).

outrider explain my-checkpoint --model-class my_model:SquaredReluLlama
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from outrider.modelling import Allocator, Decoder, LayerOps, Linear, ModelConfig, WeightSlots


class SquaredRelu:
    """down(relu(up(x))^2)."""

    def __init__(self, hidden_size: int, width: int, allocator: Allocator) -> None:
        self.up = Linear(hidden_size, {"up_proj": width}, False, allocator)
        self.down = Linear(width, {"down_proj": hidden_size}, False, allocator)

    def apply(self, ops: LayerOps, x: Tensor, residual: Tensor) -> Tensor | None:
        """x [T, H] -> [T, H] to be added to the residual stream."""
        activated = ops.multiply(x, self.up.weight, None).relu().square()
        return ops.project(activated, self.down.weight, None, residual)

    def slots(self, prefix: str) -> WeightSlots:
        """What the checkpoint fills."""
        return self.up.slots(prefix) | self.down.slots(prefix)


@dataclass(frozen=True, slots=True)
class SquaredReluSpec:
    """That MLP as data."""

    width: int

    def build(self, hidden_size: int, allocator: Allocator) -> SquaredRelu:
        """With parameters to be filled."""
        return SquaredRelu(hidden_size, self.width, allocator)


class SquaredReluLlama(Decoder):
    """The family: all else is as in a Llama."""

    architecture = "SquaredReluForCausalLM"
    qk_norm = False

    @classmethod
    def mlp(cls, config: ModelConfig) -> SquaredReluSpec:
        """Each layer's MLP."""
        return SquaredReluSpec(config.intermediate_size)
