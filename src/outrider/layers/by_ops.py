"""The backend that runs any layer: `kernels.layer_by_ops` with a device's ops, for weights in any form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.kernels.decoder_layer import attend_by_ops, layer_ops
from outrider.kernels.layer_by_ops import BoundLayer, LayersByOps
from outrider.kernels.op import Op
from outrider.layers.layer import DecoderLayer
from outrider.layers.weight import Weight


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return weight.multiply(x, bias)


def layers_by_ops(layers: Sequence[DecoderLayer], caches: Sequence[LayerCache]) -> LayersByOps:
    """Layers with their caches. The parameters given are kept, and may be written but not replaced."""
    device = caches[0].key.device
    bound = []
    for layer, cache in zip(layers, caches, strict=True):
        bound.append(BoundLayer(layer.parameters(), layer.mlp, cache, layer.spec.eps, layer.spec.attention.scale))

    def on(op: Op[..., Tensor]) -> Callable[..., Tensor]:
        return op.on(device)

    return LayersByOps(bound, layer_ops(on, _multiply), attend_by_ops(on))
