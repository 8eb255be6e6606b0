"""Decoder layers on a GPU: six kernels each for few rows, cuBLAS and the smaller ops for many. See `kernels.decoder_layer`.

For few rows the residual stream holds everything when a layer ends, so that None is left to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.gpu.linear import FEW, few_rows

MOST_TILES = 1 << 14
"""Tiles of outputs that a product split over its inputs may have."""


class GpuLayerStack:
    """Layers of one shape with their caches, as `LayerStack` for a CPU. The tensors given are kept."""

    def __init__(
        self,
        layers: Sequence[Any],  # LayerWeights
        caches: Sequence[tuple[Tensor, Tensor]],  # keys and values
        eps: float,
        num_heads: int,
        scale: float,
        *,
        by_ops: Callable[..., Tensor],  # a layer as a sequence of the smaller ops
        rope_store: Callable[..., Tensor],
        attend: Callable[..., Tensor],
        take_taps: Callable[..., None],
    ) -> None:
        self._layers = list(zip(layers, caches, strict=True))
        self._eps, self._num_heads, self._scale = eps, num_heads, scale
        self._by_ops, self._rope_store, self._attend, self._take_taps = by_ops, rope_store, attend, take_taps
        self._num_kv_heads = caches[0][0].shape[1]
        self._tickets = torch.zeros(MOST_TILES, dtype=torch.int32, device=caches[0][0].device)

    def __call__(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        rope: Tensor,
        positions: Tensor,
        cache_slot: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        taps: Sequence[int] = (),
        features: Tensor | None = None,
    ) -> Tensor | None:
        """Runs layers first:last, at least one; see `LayerStack`."""
        few = len(residual) <= FEW
        for index in range(first, last):
            weights, cache = self._layers[index]
            self._take_taps(index, x, residual, taps, features)
            if few:
                self._few(x, residual, weights, cache, rope, positions, cache_slot, block_table, query_start, seq_lens)
                x = None
                continue
            where = rope, positions, *cache, cache_slot, block_table, query_start, seq_lens
            x = self._by_ops(x, residual, *weights, self._eps, *where, self._num_heads, self._scale)
        return x

    def _few(
        self,
        x: Tensor | None,
        residual: Tensor,
        weights: Any,
        cache: tuple[Tensor, Tensor],
        rope: Tensor,
        positions: Tensor,
        cache_slot: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
    ) -> None:
        rows = residual.shape[0]
        if weights.input_norm is None:
            assert x is not None, "a layer without input_norm is given what it reads"
            source = x
        else:
            source = residual if x is None else residual.add_(x)

        def empty(width: int) -> Tensor:
            return torch.empty(rows, width, dtype=residual.dtype, device=residual.device)

        heads = empty(weights.qkv.shape[0])
        few_rows(source, weights.qkv, heads, bias=weights.qkv_bias, norm=weights.input_norm, eps=self._eps)
        norms = weights.q_norm, weights.k_norm, self._eps
        heads_of = self._num_heads, self._num_kv_heads
        query = self._rope_store(heads, *norms, rope, positions, *cache, cache_slot, *heads_of)
        mixed = self._attend(query, *cache, block_table, query_start, seq_lens, self._scale).flatten(1)
        few_rows(mixed, weights.out, residual, add=True, tickets=self._tickets)
        gated = empty(weights.down.shape[1])
        few_rows(residual, weights.gate_up, gated, norm=weights.post_norm, eps=self._eps, gate=True)
        few_rows(gated, weights.down, residual, add=True, tickets=self._tickets)
