"""Decoder layers on a GPU: five to seven kernels each for few rows, cuBLAS and the smaller ops for many.

See `kernels.decoder_layer`. The residual stream holds everything when a layer ends: None is left to be added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.kernels.decoder_layer import attend_by_ops, bind, layer_ops
from outrider.kernels.gpu.attention import multiprocessors
from outrider.kernels.gpu.linear import FEW, TICKETS, few_rows
from outrider.kernels.gpu.partial_norm import Rows as NormedRows
from outrider.kernels.gpu.partial_norm import scale_rows
from outrider.kernels.gpu.rope_attention import is_short, new_counters, rope_attention_gpu
from outrider.kernels.layer_by_ops import BoundLayer, LayersByOps
from outrider.kernels.records import HeadNorms, LayerWeights, copy_aux_hidden
from outrider.tensors import PagedRows


class DeviceLayerStack:
    """See `LayerStack`."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        caches: Sequence[tuple[Tensor, Tensor]],  # keys and values
        eps: float,
        scale: float,
    ) -> None:
        self._weights, self._eps = layers, eps
        self._layers = [bind(weights, cache, eps, scale) for weights, cache in zip(layers, caches, strict=True)]
        ops = layer_ops(lambda op: op.on("cuda"))._replace(project=_project)
        self._many = LayersByOps(self._layers, ops, self._attend_late)
        self._attend = attend_by_ops(lambda op: op.on("cuda"))
        _, self._num_kv_heads, _, head_dim = caches[0][0].shape
        self._group = len(layers[0].qkv) // head_dim // self._num_kv_heads - 2
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
        rows: PagedRows,
        aux_layers: Sequence[int] = (),
        features: Tensor | None = None,
    ) -> None:
        """Runs layers first:last, at least one; see `LayerStack`."""
        if len(residual) <= FEW:
            self._few(first, last, x, residual, rope, rows, aux_layers, features)
        else:
            self._many(first, last, x, residual, rope, rows, aux_layers, features)

    def _mix(self, heads: Tensor, layer: BoundLayer, rope: Tensor, rows: PagedRows, ahead: bool) -> Tensor:
        """What attention makes of heads [T, (Hq + 2*Hkv) * D]: [T, Hq * D]. `ahead` as in `rope_attend`: in `_few`."""
        weights = layer.parameters
        if is_short(len(heads), len(rows.block_table), self._group, self._num_kv_heads, self._processors):
            norms = HeadNorms(weights.q_norm, weights.k_norm, self._eps)
            given = heads, norms, rope, rows, *layer.cache, layer.scale
            return rope_attention_gpu(*given, self._counters, ahead, weights.out if ahead else None).flatten(1)
        return self._attend(heads, layer, rope, rows)

    def _few(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        rope: Tensor,
        rows: PagedRows,
        aux_layers: Sequence[int],
        features: Tensor | None,
    ) -> None:
        entry = self._weights[first].input_norm
        source: Tensor | NormedRows | None = x
        if entry is not None:
            source = scale_rows(x, residual, entry, self._eps)
        for index in range(first, last):
            weights = self._weights[index]
            copy_aux_hidden(index, None, residual, aux_layers, features)
            assert source is not None, "a layer without input_norm is given what it reads"
            heads = self._empty(residual, weights.qkv.shape[0])
            few_rows(source, weights.qkv, heads, bias=weights.qkv_bias, tickets=self._tickets, late=True)
            # nothing may be launched between the two
            mixed = self._mix(heads, self._layers[index], rope, rows, ahead=True)
            normed = self._add(mixed, weights.out, residual, weights.post_norm)
            assert normed is not None
            gated = self._empty(residual, weights.down.shape[1])
            few_rows(normed, weights.gate_up, gated, gate=True, tickets=self._tickets)
            after = self._weights[index + 1].input_norm if index + 1 < last else None
            source = self._add(gated, weights.down, residual, after)

    def _add(self, x: Tensor, weight: Tensor, residual: Tensor, next_norm: Tensor | None) -> NormedRows | None:
        """Adds a product to the residual stream, and norms that in part."""
        return few_rows(x, weight, residual, add=True, next_norm=next_norm, eps=self._eps, tickets=self._tickets)

    def _attend_late(self, heads: Tensor, layer: BoundLayer, rope: Tensor, rows: PagedRows) -> Tensor:
        """For many rows: no product asks for its weights ahead."""
        return self._mix(heads, layer, rope, rows, ahead=False)

    @staticmethod
    def _empty(like: Tensor, width: int) -> Tensor:
        return torch.empty(like.shape[0], width, dtype=like.dtype, device=like.device)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """A product that cuBLAS adds to the residual stream itself."""
    assert bias is None, "layers with this bias are declined"
    residual.addmm_(x, weight.t())


def decoder_layer_gpu(
    x: Tensor | None,
    residual: Tensor,
    weights: LayerWeights,
    eps: float,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
) -> None:
    """One layer alone, as a stack of one."""
    stack = DeviceLayerStack([weights], [(key_cache, value_cache)], eps, scale)
    stack(0, 1, x, residual, rope, rows)
