"""The order of a decoder layer's operations, written once, over whichever operations it is handed.

The layer is pre-norm: norm, qkv, rope, attend, out, norm, gate_up, down. Inference hands in the kernels' ops, which
write into the residual stream. Training hands in differentiable ones, which make a new stream. The reference of the
fused kernels is this function too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from outrider.kernels.records import copy_aux_hidden
from outrider.tensors import PagedRows


class LayerOps(NamedTuple):
    """The operations that a layer is made of. A weight is whatever `multiply` and `project` understand."""

    multiply: Callable[[Tensor, Any, Tensor | None], Tensor]
    """x [T, in], a weight [out, in] and a bias [out] -> [T, out]."""
    project: Callable[[Tensor, Any, Tensor | None, Tensor], Tensor | None]
    """The same for a product that belongs to the residual stream [T, out]: returned, or None if it is added already."""
    norm: Callable[[Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """x [T, H] to be added to the residual stream [T, H] first, None for nothing -> the stream, and its norm."""
    silu_mul: Callable[[Tensor], Tensor]
    """[T, 2 * W], gate beside up -> silu(gate) * up."""


class LayerParameters(NamedTuple):
    """One layer's norms [size], weights [out, in] and biases [out]; without input_norm, x is normed already."""

    input_norm: Tensor | None
    qkv: Any
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Any
    out_bias: Tensor | None
    post_norm: Tensor


class Mlp(Protocol):
    """The MLP of a layer, whatever it is made of."""

    def apply(self, ops: LayerOps, x: Tensor, residual: Tensor) -> Tensor | None:
        """x [T, H], the normed stream -> [T, H] to be added to the residual stream, as `LayerOps.project` gives it."""


class GatedMlp(NamedTuple):
    """down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer, 2020), gate and up in one product."""

    gate_up: Any
    gate_up_bias: Tensor | None
    down: Any
    down_bias: Tensor | None

    def apply(self, ops: LayerOps, x: Tensor, residual: Tensor) -> Tensor | None:
        gated = ops.silu_mul(ops.multiply(x, self.gate_up, self.gate_up_bias))
        return ops.project(gated, self.down, self.down_bias, residual)


def before_attention(
    ops: LayerOps, layer: LayerParameters, x: Tensor | None, residual: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream [T, H], and what attention reads of it: [T, (Hq + 2*Hkv) * D].

    x [T, H] is what the layer before has yet to add to the stream, None for nothing. Without input_norm it is [T, I],
    what q, k and v are made of.
    """
    if layer.input_norm is None:
        assert x is not None, "a layer without input_norm is given what it reads"
        return residual, ops.multiply(x, layer.qkv, layer.qkv_bias)
    residual, normed = ops.norm(x, residual, layer.input_norm, eps)
    return residual, ops.multiply(normed, layer.qkv, layer.qkv_bias)


def after_attention(
    ops: LayerOps, layer: LayerParameters, mlp: Mlp, mixed: Tensor, residual: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The residual stream [T, H] and what is to be added to it, None for nothing, from attention's [T, Hq * D]."""
    x = ops.project(mixed, layer.out, layer.out_bias, residual)
    residual, normed = ops.norm(x, residual, layer.post_norm, eps)
    return residual, mlp.apply(ops, normed, residual)


class BoundLayer(NamedTuple):
    """A layer with its cache."""

    parameters: LayerParameters
    mlp: Mlp
    cache: tuple[Tensor, Tensor]  # keys and values
    eps: float
    scale: float


Attend = Callable[[Tensor, BoundLayer, Tensor, PagedRows], Tensor]
"""heads [T, (Hq + 2*Hkv) * D], of a layer, at rope and the step's rows -> [T, Hq * D].

Norms q and k if the layer does, turns them, writes keys and values into the cache, and attends.
"""


class LayersByOps:
    """Layers as sequences of ops; see `records.LayerStack`."""

    def __init__(self, layers: Sequence[BoundLayer], ops: LayerOps, attend: Attend) -> None:
        self._layers, self._ops, self._attend = layers, ops, attend

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
    ) -> Tensor | None:
        """Runs layers first:last with ops that write the residual stream in place."""
        for index in range(first, last):
            layer = self._layers[index]
            copy_aux_hidden(index, None if layer.parameters.input_norm is None else x, residual, aux_layers, features)
            residual, heads = before_attention(self._ops, layer.parameters, x, residual, layer.eps)
            mixed = self._attend(heads, layer, rope, rows)
            residual, x = after_attention(self._ops, layer.parameters, layer.mlp, mixed, residual, layer.eps)
        return x
