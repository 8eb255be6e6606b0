"""One layer of a pre-norm decoder with grouped-query attention and a gated MLP, in one launch where rows are few.

x [T, H] is the block before's output, not yet added to the residual stream, or None for the first layer; residual
[T, H] is updated in place. Returns this layer's MLP output [T, H], not yet added: the hidden state after the layer is
residual + what is returned. qkv, qkv_bias, out, gate_up and down are weights as `linear` takes them; input_norm and
post_norm as `rms_norm`; the other arguments as `rope_store` and `paged_attention` take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.kernels import activation, attention, linear, norm, rope
from outrider.kernels._attention import area, attend, join, keep, plan
from outrider.kernels._numba import KIND
from outrider.kernels._threads import PHASE, enter, leave, num_threads, parallel
from outrider.kernels.native import compiled
from outrider.kernels.op import Example, Op


def _composed(on: Callable[[Op], Callable[..., Any]]) -> Callable[..., Tensor]:
    """The layer as a sequence of the smaller ops."""
    multiply, rms_norm, add_rms_norm = on(linear.LINEAR), on(norm.RMS_NORM), on(norm.ADD_RMS_NORM)
    silu_mul, rope_store, attend = on(activation.SILU_MUL), on(rope.ROPE_STORE), on(attention.PAGED_ATTENTION)

    def decoder_layer(
        x: Tensor | None,
        residual: Tensor,
        input_norm: Tensor,
        qkv: Tensor,
        qkv_bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        out: Tensor,
        post_norm: Tensor,
        gate_up: Tensor,
        down: Tensor,
        eps: float,
        rope: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_slot: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        num_heads: int,
        scale: float,
    ) -> Tensor:
        normed = rms_norm(residual, input_norm, eps) if x is None else add_rms_norm(x, residual, input_norm, eps)
        cache = key_cache, value_cache
        heads = multiply(normed, qkv, qkv_bias)
        query = rope_store(
            heads, q_norm, k_norm, eps, rope, positions, *cache, cache_slot, num_heads, key_cache.shape[1]
        )
        mixed = attend(query, *cache, block_table, query_start, seq_lens, scale).flatten(1)
        normed = add_rms_norm(multiply(mixed, out), residual, post_norm, eps)
        gated: Tensor = multiply(silu_mul(multiply(normed, gate_up)), down)
        return gated

    return decoder_layer


decoder_layer_reference = _composed(lambda op: op.reference)
_decoder_layer_many = _composed(lambda op: op.on("cpu"))


@compiled()
def _layer(
    tickets: int,
    phases: int,
    threads: int,
    x: int,
    residual: int,
    input_norm: int,
    qkv: int,
    qkv_bias: int,
    q_norm: int,
    k_norm: int,
    out: int,
    post_norm: int,
    gate_up: int,
    down: int,
    kind: int,
    eps: float,
    rope: int,
    positions: int,
    key_cache: int,
    value_cache: int,
    cache_slot: int,
    tasks: int,
    num_tasks: int,
    areas: int,
    num_areas: int,
    block_table: int,
    max_blocks: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    tokens: int,
    hidden: int,
    width: int,
    normed: int,
    wide: int,
    query: int,
    result: int,
) -> None:
    """Phase by phase; each is a kernel of the ops that the layer is made of."""
    group, heads, both = num_heads // num_kv_heads, num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
    phase = phases
    enter(phase)
    if x == 0:
        norm_rows(phase, residual, 0, input_norm, kind, normed, tokens, hidden, eps)
    else:
        norm_rows(phase, x, residual, input_norm, kind, normed, tokens, hidden, eps)
    leave(phase)
    phase += PHASE
    enter(phase)
    few_rows(phase, normed, qkv, qkv_bias, wide, tokens, hidden, both, kind, threads)
    leave(phase)
    phase += PHASE
    enter(phase)
    rope_tokens(
        phase, wide, q_norm, k_norm, kind, eps, rope, positions, key_cache, value_cache, cache_slot, block_size,
        num_heads, num_kv_heads, head_dim, query, tokens
    )
    leave(phase)
    phase += PHASE
    enter(phase)
    attend(
        phase, tasks, num_tasks, areas, query, key_cache, value_cache, block_table, max_blocks, group, num_kv_heads,
        block_size, head_dim, scale, wide
    )
    leave(phase)
    phase += PHASE
    if num_areas > 0:
        enter(phase)
        join(phase, tasks, num_tasks, areas, group, num_kv_heads, head_dim, wide)
        leave(phase)
        phase += PHASE
    enter(phase)
    few_rows(phase, wide, out, 0, result, tokens, heads, hidden, kind, threads)
    leave(phase)
    phase += PHASE
    enter(phase)
    norm_rows(phase, result, residual, post_norm, kind, normed, tokens, hidden, eps)
    leave(phase)
    phase += PHASE
    enter(phase)
    few_rows(phase, normed, gate_up, 0, wide, tokens, hidden, 2 * width, kind, threads)
    leave(phase)
    phase += PHASE
    enter(phase)
    gate_rows(phase, wide, query, tokens, width)
    leave(phase)
    phase += PHASE
    enter(phase)
    few_rows(phase, query, down, 0, result, tokens, width, hidden, kind, threads)
    leave(phase)
