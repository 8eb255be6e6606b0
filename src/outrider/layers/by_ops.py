"""The backend that runs any layer: `kernels.layer_by_ops` with a device's ops, over the paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.kernels.activation import SILU_MUL
from outrider.kernels.attention import PAGED_ATTENTION
from outrider.kernels.layer_by_ops import LayerOps, decoder_layer
from outrider.kernels.norm import ADD_RMS_NORM, RMS_NORM
from outrider.kernels.records import take_taps
from outrider.kernels.rope import ROPE_STORE
from outrider.layers.layer import DecoderLayer
from outrider.layers.weight import Weight
from outrider.tensors import StepBatch


def device_ops(device: torch.device) -> LayerOps:
    """The kernels of a device. The residual stream is written in place."""
    rms_norm, add_rms_norm = RMS_NORM.on(device), ADD_RMS_NORM.on(device)

    def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        return weight.multiply(x, bias)

    def project(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> Tensor:
        return weight.multiply(x, bias)

    def norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed = rms_norm(residual, weight, eps) if x is None else add_rms_norm(x, residual, weight, eps)
        return residual, normed

    return LayerOps(multiply, project, norm, SILU_MUL.on(device))


class ByOpsStack:
    """Layers with their caches. The parameters given are kept, and may be written but not replaced."""

    def __init__(self, layers: Sequence[DecoderLayer], caches: Sequence[LayerCache]) -> None:
        device = caches[0].key.device
        self._layers = [
            (layer.spec, layer.parameters(), layer.mlp, cache) for layer, cache in zip(layers, caches, strict=True)
        ]
        self._ops = device_ops(device)
        self._rope_store, self._attention = ROPE_STORE.on(device), PAGED_ATTENTION.on(device)

    def __call__(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        rope: Tensor,
        batch: StepBatch,
        taps: Sequence[int],
        features: Tensor | None,
    ) -> Tensor | None:
        for index in range(first, last):
            spec, parameters, mlp, _ = self._layers[index]
            take_taps(index, x, residual, taps, features)
            attend = self._attend(index, rope, batch)
            residual, x = decoder_layer(self._ops, parameters, mlp, x, residual, spec.eps, attend)
        return x

    def _attend(self, index: int, rope: Tensor, batch: StepBatch) -> Callable[[Tensor], Tensor]:
        """Attention over the cache, into which the step's keys and values are written first."""
        spec, parameters, _, cache = self._layers[index]

        def attend(heads: Tensor) -> Tensor:
            query = self._rope_store(
                heads,
                parameters.q_norm,
                parameters.k_norm,
                spec.eps,
                rope,
                batch.positions,
                cache.key,
                cache.value,
                batch.cache_slot,
                spec.attention.num_heads,
                spec.attention.num_kv_heads,
            )
            where = batch.block_table, batch.query_start, batch.seq_lens
            mixed: Tensor = self._attention(query, cache.key, cache.value, *where, spec.attention.scale)
            return mixed.flatten(1)

        return attend
