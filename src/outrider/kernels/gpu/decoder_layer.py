"""Decoder layers on a GPU: five to seven kernels each for few rows, cuBLAS and the smaller ops for many.

See `kernels.decoder_layer`. The residual stream holds everything when a layer ends: None is left to be added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.kernels import activation, attention, linear, norm, rope
from outrider.kernels.gpu.attention import multiprocessors
from outrider.kernels.gpu.linear import FEW, TICKETS, few_rows
from outrider.kernels.gpu.partial_norm import Rows, scale_rows
from outrider.kernels.gpu.rope_attention import is_short, new_counters, rope_attention_gpu
from outrider.kernels.records import LayerWeights, one_layer, take_taps


class DeviceLayerStack:
    """See `LayerStack`."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        caches: Sequence[tuple[Tensor, Tensor]],  # keys and values
        eps: float,
        num_heads: int,
        scale: float,
    ) -> None:
        self._layers = list(zip(layers, caches, strict=True))
        self._eps, self._num_heads, self._scale = eps, num_heads, scale
        self._rms_norm, self._add_rms_norm = norm.RMS_NORM.on("cuda"), norm.ADD_RMS_NORM.on("cuda")
        self._silu_mul, self._multiply = activation.SILU_MUL.on("cuda"), linear.LINEAR.on("cuda")
        self._rope_store, self._attend = rope.ROPE_STORE.on("cuda"), attention.PAGED_ATTENTION.on("cuda")
        self._num_kv_heads = caches[0][0].shape[1]
        device = caches[0][0].device
        self._processors = multiprocessors(device)
        self._counters = new_counters(device, self._num_kv_heads)
        self._tickets = torch.zeros(TICKETS, dtype=torch.int32, device=device)

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
    ) -> None:
        """Runs layers first:last, at least one; see `LayerStack`."""
        where = rope, positions, cache_slot, block_table, query_start, seq_lens
        run = self._few if len(residual) <= FEW else self._many
        run(first, last, x, residual, where, taps, features)

    def _mix(self, index: int, heads: Tensor, where: tuple[Tensor, ...], ahead: bool) -> Tensor:
        """What attention makes of heads [T, (Hq + 2*Hkv) * D]: [T, Hq * D]. `ahead` as in `rope_attend`: in `_few`."""
        rope, positions, cache_slot, block_table, query_start, seq_lens = where
        weights, cache = self._layers[index]
        norms = weights.q_norm, weights.k_norm, self._eps
        counts, rows = (self._num_heads, self._num_kv_heads), (block_table, query_start, seq_lens)
        group = self._num_heads // self._num_kv_heads
        if is_short(len(heads), len(block_table), group, self._num_kv_heads, self._processors):
            given = (heads, *norms, rope, positions, *cache, cache_slot, *rows, *counts, self._scale)
            return rope_attention_gpu(*given, self._counters, ahead, weights.out if ahead else None).flatten(1)
        query = self._rope_store(heads, *norms, rope, positions, *cache, cache_slot, *counts)
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
            weights = self._layers[index][0]
            take_taps(index, None, residual, taps, features)
            assert source is not None, "a layer without input_norm is given what it reads"
            heads = self._empty(residual, weights.qkv.shape[0])
            few_rows(source, weights.qkv, heads, bias=weights.qkv_bias, tickets=self._tickets, late=True)
            mixed = self._mix(index, heads, where, ahead=True)  # nothing may be launched between the two
            normed = self._add(mixed, weights.out, residual, weights.post_norm)
            assert normed is not None
            gated = self._empty(residual, weights.down.shape[1])
            few_rows(normed, weights.gate_up, gated, gate=True, tickets=self._tickets)
            after = self._layers[index + 1][0].input_norm if index + 1 < last else None
            source = self._add(gated, weights.down, residual, after)

    def _add(self, x: Tensor, weight: Tensor, residual: Tensor, next_norm: Tensor | None) -> Rows | None:
        """Adds a product to the residual stream, and norms that in part."""
        return few_rows(x, weight, residual, add=True, next_norm=next_norm, eps=self._eps, tickets=self._tickets)

    def _many(
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
            weights = self._layers[index][0]
            if weights.input_norm is None:
                assert x is not None, "a layer without input_norm is given what it reads"
                source = x
            elif x is None:
                source = self._rms_norm(residual, weights.input_norm, self._eps)
            else:
                source = self._add_rms_norm(x, residual, weights.input_norm, self._eps)
            x = None
            take_taps(index, None, residual, taps, features)
            mixed = self._mix(index, self._multiply(source, weights.qkv, weights.qkv_bias), where, ahead=False)
            residual.addmm_(mixed, weights.out.t())
            normed = self._rms_norm(residual, weights.post_norm, self._eps)
            gated = self._silu_mul(self._multiply(normed, weights.gate_up))
            residual.addmm_(gated, weights.down.t())

    @staticmethod
    def _empty(like: Tensor, width: int) -> Tensor:
        return torch.empty(like.shape[0], width, dtype=like.dtype, device=like.device)


decoder_layer_gpu = one_layer(DeviceLayerStack)
