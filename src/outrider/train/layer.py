"""A decoder layer over whole rows: `kernels.layer_by_ops` with ops that autograd can follow.

A layer is cut at its attention, which is compiled by itself: `before` and `after` are what may be compiled around it.
A weight here is a tuple of matrices, multiplied side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.layer_by_ops import GatedMlp, LayerOps, LayerParameters, after_attention, before_attention
from outrider.layers.layer import DecoderLayer
from outrider.layers.mlp import GatedMLP
from outrider.layers.weight import Dense, Weight
from outrider.train.functional import multiply, rms_norm, rotate
from outrider.train.weight import Separate


def _project(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, residual: Tensor) -> Tensor:
    return multiply(x, weights, bias)


def _norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual if x is None else residual + x
    return residual, rms_norm(residual, weight, eps)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


OPS = LayerOps(multiply, _project, _norm, _silu_mul)
"""Every op returns a new residual stream and writes nothing in place."""


class Sizes(NamedTuple):
    """What a layer's functions are compiled for."""

    num_kv_heads: int
    head_dim: int
    eps: float


class Layer(NamedTuple):
    """One layer as plain tensors, so that one compiled function serves all layers."""

    parameters: LayerParameters
    mlp: GatedMlp
    sizes: Sizes

    @classmethod
    def of(cls, layer: DecoderLayer) -> Layer:
        """Of a model's or a head's layer, whose MLP is the gated one."""
        given, mlp, spec = layer.parameters(), layer.mlp, layer.spec
        assert isinstance(mlp, GatedMLP), f"layers with {type(mlp).__name__} are not trained"
        return cls(
            given._replace(qkv=_matrices(given.qkv), out=_matrices(given.out)),
            GatedMlp(_matrices(mlp.gate_up.weight), mlp.gate_up.bias, _matrices(mlp.down.weight), mlp.down.bias),
            Sizes(spec.attention.num_kv_heads, spec.attention.head_dim, spec.eps),
        )


def _matrices(weight: Weight) -> tuple[Tensor, ...]:
    if isinstance(weight, Separate):
        return weight.parts
    assert isinstance(weight, Dense), f"weights in the form {type(weight).__name__} are not trained with"
    return (weight.tensor,)


def before(
    layer: Layer, x: Tensor | None, residual: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual stream [B, N, H]; turned q [B, Hq, N, D], turned k and v [B, Hkv, N, D].

    `x` as `before_attention` takes it; `cos` and `sin` as `rotate`.
    """
    parameters, sizes = layer.parameters, layer.sizes
    residual, joined = before_attention(OPS, parameters, x, residual, sizes.eps)
    heads = joined.view(*joined.shape[:2], -1, sizes.head_dim).transpose(1, 2)
    num_heads = heads.shape[1] - 2 * sizes.num_kv_heads
    q, k, v = torch.split(heads, [num_heads, sizes.num_kv_heads, sizes.num_kv_heads], dim=1)
    if parameters.q_norm is not None and parameters.k_norm is not None:
        q, k = rms_norm(q, parameters.q_norm, sizes.eps), rms_norm(k, parameters.k_norm, sizes.eps)
    return residual, rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def after(layer: Layer, mixed: Tensor, residual: Tensor) -> Tensor:
    """The residual stream [B, N, H] after a layer, from it before and attention's [B, Hq, N, D]."""
    mixed = mixed.transpose(1, 2).flatten(2)
    residual, x = after_attention(OPS, layer.parameters, layer.mlp, mixed, residual, layer.sizes.eps)
    return residual if x is None else residual + x
