"""Attention over the paged cache: q, k, v in one product, rotation and cache write in one kernel."""

from __future__ import annotations

from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.kernels.attention import PAGED_ATTENTION
from outrider.kernels.rope import ROPE_STORE
from outrider.layers.linear import Linear
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator, Weights
from outrider.tensors import StepBatch


class Attention:
    """Grouped-query causal attention with rotary positions, and per-head norms of q and k if asked."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        qk_norm_eps: float | None,  # None: q and k are not normalised
        allocator: Allocator,
        input_size: int | None = None,  # width of what q, k and v are made from, where it is not hidden_size
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        q, kv = num_heads * head_dim, num_kv_heads * head_dim
        self.qkv = Linear(input_size or hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias, allocator)
        self.out = Linear(q, {"o_proj": hidden_size}, bias, allocator)
        self.eps = qk_norm_eps or 0.0
        normed = qk_norm_eps is not None
        self.q_norm = RMSNorm(head_dim, self.eps, allocator) if normed else None
        self.k_norm = RMSNorm(head_dim, self.eps, allocator) if normed else None
        self._rope_store = ROPE_STORE.on(allocator.device)
        self._attention = PAGED_ATTENTION.on(allocator.device)

    def __call__(self, x: Tensor, batch: StepBatch, rope: Tensor, cache: LayerCache) -> Tensor:
        """[T, input size] -> [T, H]; writes the step's keys and values into the cache first."""
        query = self._rope_store(
            self.qkv(x),
            self.q_norm.weight if self.q_norm else None,
            self.k_norm.weight if self.k_norm else None,
            self.eps,
            rope,
            batch.positions,
            cache.key,
            cache.value,
            batch.cache_slot,
            self.num_heads,
            self.num_kv_heads,
        )
        mixed = self._attention(
            query,
            cache.key,
            cache.value,
            batch.block_table,
            batch.query_start,
            batch.seq_lens,
            self.head_dim**-0.5,
        )
        return self.out(mixed.view(mixed.shape[0], -1))

    def weights(self, prefix: str) -> Weights:
        found = self.qkv.weights(prefix) | self.out.weights(prefix)
        if self.q_norm and self.k_norm:
            found |= self.q_norm.weights(f"{prefix}q_norm.") | self.k_norm.weights(f"{prefix}k_norm.")
        return found
