"""One decoder layer's parameters, built from its spec, under the names that checkpoints give them."""

from __future__ import annotations

from dataclasses import replace

from outrider.kernels.layer_by_ops import LayerParameters
from outrider.layers.attention import Attention
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator
from outrider.layers.spec import LayerSpec
from outrider.layers.weight import WeightSlots


class DecoderLayer:
    """The parameters of a layer. A backend runs it: see `layers.stack`."""

    def __init__(self, spec: LayerSpec, allocator: Allocator) -> None:
        """Parameters are NaN until `slots()` is filled."""
        size, eps = spec.hidden_size, spec.eps
        if spec.form is not None:
            allocator = replace(allocator, form=spec.form)
        self.spec = spec
        self.input_norm = RMSNorm(size, eps, allocator)  # a joined input's: of the embedding
        self.hidden_norm = RMSNorm(size, eps, allocator) if spec.joined else None
        self.attention = Attention(spec.attention, 2 * size if spec.joined else size, size, eps, allocator)
        self.post_norm = RMSNorm(size, eps, allocator)
        self.mlp = spec.mlp.build(size, allocator)

    def parameters(self) -> LayerParameters:
        """What `kernels.layer_by_ops` reads. A joined input is normed before it comes to the layer."""
        attention = self.attention
        return LayerParameters(
            None if self.spec.joined else self.input_norm.weight,
            attention.qkv.weight,
            attention.qkv.bias,
            attention.q_norm.weight if attention.q_norm else None,
            attention.k_norm.weight if attention.k_norm else None,
            attention.out.weight,
            attention.out.bias,
            self.post_norm.weight,
        )

    def slots(self, prefix: str) -> WeightSlots:
        """The checkpoint's names for every parameter."""
        hidden = self.hidden_norm.slots(f"{prefix}hidden_norm.") if self.hidden_norm else {}
        return (
            self.input_norm.slots(f"{prefix}input_layernorm.")
            | hidden
            | self.attention.slots(f"{prefix}self_attn.")
            | self.post_norm.slots(f"{prefix}post_attention_layernorm.")
            | self.mlp.slots(f"{prefix}mlp.")
        )
