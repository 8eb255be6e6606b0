"""One layer of a pre-norm decoder with grouped-query attention and a gated MLP.

    x [T, H]          what the layer before returned, not yet added to the residual stream; None for the first layer
    residual [T, H]   the residual stream, written in place
    weights           `linear` defines qkv, qkv_bias, out, gate_up and down; `rms_norm` defines the norms
    other arguments   as `rope_store` and `paged_attention` take them

Returns the layer's MLP output [T, H], not yet added: the hidden state after the layer is residual + what is returned.
A kernel may add all of it to the residual stream itself; it then returns None.

Without input_norm, x [T, I] is the normed input of the qkv product, and it is not added to the residual stream. The
first layer of a draft head uses this: it reads more than the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from outrider.kernels import activation, attention, linear, norm, rope
from outrider.kernels.layer_by_ops import Attend, BoundLayer, GatedMlp, LayerOps, LayerParameters, LayersByOps
from outrider.kernels.op import Op
from outrider.kernels.records import HeadNorms, LayerStack, LayerWeights
from outrider.tensors import PagedRows

On = Callable[[Op[..., Any]], Callable[..., Any]]
"""Which implementation of an op to take."""


def layer_ops(on: On, multiply: Callable[[Tensor, Any, Tensor | None], Tensor] | None = None) -> LayerOps:
    """The smaller ops for weights that are tensors, or for those that `multiply` understands.

    They write the residual stream in place.
    """
    product = multiply or on(linear.LINEAR)
    rms_norm, add_rms_norm = on(norm.RMS_NORM), on(norm.ADD_RMS_NORM)

    def project(x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor) -> Tensor:
        return product(x, weight, bias)

    def normalise(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed = rms_norm(residual, weight, eps) if x is None else add_rms_norm(x, residual, weight, eps)
        return residual, normed

    return LayerOps(product, project, normalise, on(activation.SILU_MUL))


def attend_by_ops(on: On) -> Attend:
    """Attention over the paged cache in two ops."""
    rope_store, paged_attention = on(rope.ROPE_STORE), on(attention.PAGED_ATTENTION)

    def attend(heads: Tensor, layer: BoundLayer, rope: Tensor, rows: PagedRows) -> Tensor:
        norms = HeadNorms(layer.parameters.q_norm, layer.parameters.k_norm, layer.eps)
        query = rope_store(heads, norms, rope, rows, *layer.cache)
        mixed: Tensor = paged_attention(query, *layer.cache, rows, layer.scale)
        return mixed.flatten(1)

    return attend


def bind(weights: LayerWeights, cache: tuple[Tensor, Tensor], eps: float, scale: float) -> BoundLayer:
    """A layer of dense weights with its cache."""
    _, _, _, _, _, out, post_norm, gate_up, down = weights
    parameters = LayerParameters(*weights[:5], out, None, post_norm)
    return BoundLayer(parameters, GatedMlp(gate_up, None, down, None), cache, eps, scale)


def layers_by_ops(
    on: On,
    layers: Sequence[LayerWeights],
    caches: Sequence[tuple[Tensor, Tensor]],  # keys and values
    eps: float,
    scale: float,
) -> LayersByOps:
    """Layers of dense weights as sequences of ops, each as `on` gives it."""
    bound = [bind(weights, cache, eps, scale) for weights, cache in zip(layers, caches, strict=True)]
    return LayersByOps(bound, layer_ops(on), attend_by_ops(on))


def decoder_layer_reference(
    x: Tensor | None,
    residual: Tensor,
    weights: LayerWeights,
    eps: float,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
) -> Tensor | None:
    layer = layers_by_ops(lambda op: op.reference, [weights], [(key_cache, value_cache)], eps, scale)
    return layer(0, 1, x, residual, rope, rows)


DECODER_LAYER = Op(
    "decoder_layer",
    decoder_layer_reference,
    outputs=("residual", "key_cache", "value_cache"),
    tolerance=1e-3,
    tolerance_16bit=2e-2,
    why="four products deep, a key between two bfloat16 may be rounded to either, and the interpreter cuts some off",
)


def layer_stack(
    layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]], eps: float, scale: float
) -> LayerStack:
    """Layers with their caches of keys and values as the stack of the device that they are on."""
    file = DECODER_LAYER.module(caches[0][0].device.type)
    stack: LayerStack = file.DeviceLayerStack(layers, caches, eps, scale)
    return stack
