"""The products and norms around attention: q, k and v in one product, and the output's."""

from __future__ import annotations

from outrider.layers.linear import Linear
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator
from outrider.layers.spec import AttentionSpec
from outrider.layers.weight import WeightSlots


class Attention:
    """The parameters of one layer's attention; `kernels.layer_by_ops` has the order in which they are used."""

    def __init__(
        self,
        spec: AttentionSpec,
        input_size: int,  # what q, k and v are made from
        hidden_size: int,
        eps: float,
        allocator: Allocator,
    ) -> None:
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(input_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, spec.qkv_bias, allocator)
        self.out = Linear(q, {"o_proj": hidden_size}, spec.out_bias, allocator)
        self.q_norm = RMSNorm(spec.head_dim, eps, allocator) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, eps, allocator) if spec.qk_norm else None

    def slots(self, prefix: str) -> WeightSlots:
        found = self.qkv.slots(prefix) | self.out.slots(prefix)
        if self.q_norm and self.k_norm:
            found |= self.q_norm.slots(f"{prefix}q_norm.") | self.k_norm.slots(f"{prefix}k_norm.")
        return found
