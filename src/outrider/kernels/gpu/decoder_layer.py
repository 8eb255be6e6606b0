"""Decoder layers on a GPU: six kernels each for few rows, cuBLAS and the smaller ops for many.

See `kernels.decoder_layer`. For few rows the residual stream holds everything when a layer ends, so that None is left
to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.gpu.linear import FEW, ROWS, Rows, few_rows, in_registers, scale_rows


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
        where = rope, positions, cache_slot, block_table, query_start, seq_lens
        if len(residual) <= FEW:
            run = self._in_registers if len(residual) <= ROWS else self._few
            run(first, last, x, residual, where, taps, features)
            return None
        for index in range(first, last):
            weights, cache = self._layers[index]
            self._take_taps(index, x, residual, taps, features)
            given = *where[:2], *cache, *where[2:]
            x = self._by_ops(x, residual, *weights, self._eps, *given, self._num_heads, self._scale)
        return x

    def _in_registers(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        where: tuple[Tensor, ...],
        taps: Sequence[int],
        features: Tensor | None,
    ) -> None:
        for index in range(first, last):
            weights, cache = self._layers[index]
            source = residual
            if weights.input_norm is None:
                assert x is not None, "a layer without input_norm is given what it reads"
                source = x
            elif x is not None:
                residual.add_(x)
            x = None
            self._take_taps(index, None, residual, taps, features)
            heads = self._empty(residual, weights.qkv.shape[0])
            in_registers(source, weights.qkv, heads, bias=weights.qkv_bias, norm=weights.input_norm, eps=self._eps)
            in_registers(self._mix(heads, weights, cache, where), weights.out, residual, add=True)
            gated = self._empty(residual, weights.down.shape[1])
            in_registers(residual, weights.gate_up, gated, norm=weights.post_norm, eps=self._eps, gate=True)
            in_registers(gated, weights.down, residual, add=True)

    def _mix(self, heads: Tensor, weights: Any, cache: tuple[Tensor, Tensor], where: tuple[Tensor, ...]) -> Tensor:
        """Attention, from queries, keys and values [T, (Hq + 2*Hkv) * D] to [T, Hq * D]."""
        rope, positions, cache_slot, *rows = where
        norms = weights.q_norm, weights.k_norm, self._eps
        heads_of = self._num_heads, self._num_kv_heads
        query = self._rope_store(heads, *norms, rope, positions, *cache, cache_slot, *heads_of)
        return self._attend(query, *cache, *rows, self._scale).flatten(1)

    def _few(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        where: tuple[Tensor, ...],
        taps: Sequence[int],
        features: Tensor | None,
    ) -> None:
        entry = self._layers[first][0].input_norm
        source: Tensor | Rows | None = x
        if entry is not None:
            source = scale_rows(x, residual, entry, self._eps)
        for index in range(first, last):
            weights, cache = self._layers[index]
            self._take_taps(index, None, residual, taps, features)
            assert source is not None, "a layer without input_norm is given what it reads"
            heads = self._empty(residual, weights.qkv.shape[0])
            few_rows(source, weights.qkv, heads, bias=weights.qkv_bias)
            mixed = self._mix(heads, weights, cache, where)
            normed = few_rows(mixed, weights.out, residual, add=True, next_norm=weights.post_norm, eps=self._eps)
            assert normed is not None
            gated = self._empty(residual, weights.down.shape[1])
            few_rows(normed, weights.gate_up, gated, gate=True)
            after = self._layers[index + 1][0].input_norm if index + 1 < last else None
            source = few_rows(gated, weights.down, residual, add=True, next_norm=after, eps=self._eps)

    @staticmethod
    def _empty(like: Tensor, width: int) -> Tensor:
        return torch.empty(like.shape[0], width, dtype=like.dtype, device=like.device)
