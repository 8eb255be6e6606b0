"""What a decoder layer is, as data: its attention, its MLP, its norms, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from outrider.kernels.layer_by_ops import Mlp
from outrider.layers.parameter import Allocator, WeightForm
from outrider.layers.weight import WeightSlots


class LayerFeature(Enum):
    """What a layer may have that a fused kernel may lack."""

    OUT_BIAS = auto()  # a bias on attention's output product
    MLP_BIAS = auto()  # biases on the MLP's products
    OTHER_MLP = auto()  # an MLP that is not the gated one
    OTHER_WEIGHTS = auto()  # matrices in a form that is not one tensor


class MlpModule(Mlp, Protocol):
    """An MLP with its parameters."""

    def slots(self, prefix: str) -> WeightSlots:
        """The checkpoint's names for its parameters."""


class MlpSpec(Protocol):
    """An MLP as data. A family with another MLP brings a class with this method."""

    def build(self, hidden_size: int, allocator: Allocator) -> MlpModule:
        """The MLP with parameters that are still NaN."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query causal attention with rotary positions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool = False  # whether each head's q and k are normalised before they are turned
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class JoinedInput:
    """The first layer of a draft head reads [embedding; hidden], each normed by itself.

    The residual stream starts with hidden, or with its norm.
    """

    norm_before_residual: bool


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A pre-norm decoder layer: norm, attention, add, norm, MLP, add."""

    hidden_size: int
    eps: float  # of all its norms
    attention: AttentionSpec
    mlp: MlpSpec
    joined: JoinedInput | None = None  # None: it reads the residual stream
    form: WeightForm | None = None  # of its matrices; None: the allocator's form
