"""What authors of model families import: a family is one file with a `Decoder`, named as `module:Class`."""

from __future__ import annotations

from outrider.kernels.layer_by_ops import LayerOps
from outrider.layers.linear import Linear
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator, WeightForm
from outrider.layers.spec import AttentionSpec, LayerSpec, MlpModule, MlpSpec
from outrider.layers.weight import TensorSlot, Weight, WeightSlot, WeightSlots
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder

__all__ = [
    "Allocator",
    "AttentionSpec",
    "Decoder",
    "LayerOps",
    "LayerSpec",
    "Linear",
    "MlpModule",
    "MlpSpec",
    "ModelConfig",
    "RMSNorm",
    "TensorSlot",
    "Weight",
    "WeightForm",
    "WeightSlot",
    "WeightSlots",
]
