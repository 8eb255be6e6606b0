"""The CPU's decoder layer: the kernels of the ops that it is made of, as phases of one launch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from outrider.kernels._amx import alone, fits, pack, products, small, tile_height
from outrider.kernels._attention import area, attend, join, plan
from outrider.kernels._numba import LANES, address, keep
from outrider.kernels._threads import PHASE, enter, leave, parallel
from outrider.kernels.activation import gate_rows
from outrider.kernels.linear import few_rows
from outrider.kernels.native import compiled, pointer
from outrider.kernels.norm import norm_rows
from outrider.kernels.rope import rope_tokens

_NONE: Any = np.int64(0)  # a plain 0 would be a type of its own to numba, and a second copy of what takes it


@compiled()
def _linear(
    phase: int,
    packed: int,
    x: int,
    weight: int,
    bias: int,
    out: int,
    rows: int,
    inputs: int,
    outputs: int,
    kind: int,
    tiles: int,
    threads: int,
) -> int:
    """One product, by whichever kernel `linear` would take; returns the phase after it."""
    if tiles and fits(inputs, outputs):
        height = tile_height(rows)
        if small(rows, inputs):
            enter(phase)
            alone(phase, x, rows, height, inputs, weight, bias, outputs, out, threads)
        else:
            enter(phase)
            pack(phase, x, rows, inputs, height, packed)
            leave(phase)
            phase += PHASE
            enter(phase)
            products(phase, packed, rows, height, inputs, weight, bias, outputs, out, threads)
    else:
        enter(phase)
        few_rows(phase, x, weight, bias, out, rows, inputs, outputs, kind, threads)
    leave(phase)
    return phase + PHASE


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
    tiles: int,
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
    owned: int,
    hidden: int,
    width: int,
    normed: int,
    wide: int,
    query: int,
    packed: int,
    result: int,
) -> None:
    """Phase by phase; each is a kernel of the ops that the layer is made of."""
    group, heads, both = num_heads // num_kv_heads, num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
    phase = phases
    enter(phase)
    if x == 0:
        norm_rows(phase, residual, _NONE, input_norm, kind, normed, tokens, hidden, eps)
    else:
        norm_rows(phase, x, residual, input_norm, kind, normed, tokens, hidden, eps)
    leave(phase)
    phase += PHASE
    phase = _linear(phase, packed, normed, qkv, qkv_bias, wide, tokens, hidden, both, kind, tiles, threads)
    enter(phase)
    rope_tokens(
        phase,
        wide,
        q_norm,
        k_norm,
        kind,
        eps,
        rope,
        positions,
        key_cache,
        value_cache,
        cache_slot,
        block_size,
        num_heads,
        num_kv_heads,
        head_dim,
        query,
        tokens,
    )
    leave(phase)
    phase += PHASE
    enter(phase)
    attend(
        phase,
        tasks,
        num_tasks,
        areas,
        query,
        key_cache,
        value_cache,
        block_table,
        max_blocks,
        group,
        num_kv_heads,
        block_size,
        head_dim,
        scale,
        wide,
        owned,
        tokens,
    )
    leave(phase)
    phase += PHASE
    if num_areas > 0:
        enter(phase)
        join(phase, tasks, num_tasks, areas, group, num_kv_heads, head_dim, wide)
        leave(phase)
        phase += PHASE
    phase = _linear(phase, packed, wide, out, _NONE, result, tokens, heads, hidden, kind, tiles, threads)
    enter(phase)
    norm_rows(phase, result, residual, post_norm, kind, normed, tokens, hidden, eps)
    leave(phase)
    phase += PHASE
    phase = _linear(phase, packed, normed, gate_up, _NONE, wide, tokens, hidden, 2 * width, kind, tiles, threads)
    enter(phase)
    gate_rows(phase, wide, query, tokens, width)
    leave(phase)
    phase += PHASE
    phase = _linear(phase, packed, query, down, _NONE, result, tokens, width, hidden, kind, tiles, threads)


@compiled()
def layer_kernel(
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
    tiles: int,
    eps: float,
    rope: int,
    positions: int,
    key_cache: int,
    value_cache: int,
    cache_slot: int,
    block_table: int,
    query_start: int,
    seq_lens: int,
    rows: int,
    max_blocks: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    tokens: int,
    hidden: int,
    width: int,
    result: int,
    threads: int,
) -> None:
    """See `decoder_layer`; x, qkv_bias and the head norms may be 0 for none, result is what it returns."""
    tasks = plan(query_start, seq_lens, rows, num_heads // num_kv_heads, num_kv_heads)
    count, num_areas = tasks[-1, 0], tasks[-1, 1]
    areas = np.empty(num_areas * area(head_dim), np.uint8)
    owned = int(carray(pointer(query_start), (rows + 1,), np.int32)[rows])
    phases = np.zeros(16 * PHASE, np.uint8)
    both = (num_heads + 2 * num_kv_heads) * head_dim
    most = max(num_heads * head_dim, width)
    sizes = (tokens * hidden, tokens * max(both, 2 * width), tokens * most)
    space = np.empty(sizes[0] + sizes[1] + sizes[2] + (tokens + LANES) * max(most, hidden), np.float32)
    normed = address(space)
    wide = normed + sizes[0] * 4
    query = wide + sizes[1] * 4
    weights = (input_norm, qkv, qkv_bias, q_norm, k_norm, out, post_norm, gate_up, down, kind, tiles)
    cache = (rope, positions, key_cache, value_cache, cache_slot)
    reads = (address(tasks), count, address(areas), num_areas, block_table, max_blocks, block_size)
    shape = (num_heads, num_kv_heads, head_dim, scale, tokens, owned, hidden, width)
    memory = (normed, wide, query, query + sizes[2] * 4, result)
    start = (address(phases), threads, x, residual)
    parallel(_layer, threads, (*start, *weights, eps, *cache, *reads, *shape, *memory))
    keep(tasks)
    keep(areas)
    keep(phases)
    keep(space)
