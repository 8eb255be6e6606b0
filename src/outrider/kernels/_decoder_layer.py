"""The CPU's decoder layer: the kernels of the ops that it is made of, as phases of one launch."""

from __future__ import annotations

import numpy as np
from numba import carray

from outrider.kernels._amx import alone, fits, pack, products, small, tile_height
from outrider.kernels._attention import area, attend, join, plan
from outrider.kernels._numba import LANES, NO, YES, address, copy_row, keep
from outrider.kernels._threads import PHASE, add, enter, leave, parallel
from outrider.kernels.activation import gate_rows
from outrider.kernels.linear import FEW, few_rows
from outrider.kernels.native import compiled, pointer
from outrider.kernels.norm import norm_rows
from outrider.kernels.rope import rope_tokens

_BLOCK = 256, 1 << 21  # tokens that pass through a layer at once: at least, and as many as take so many bytes


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
    gated: int,
    kind: int,
    tiles: int,
    threads: int,
) -> int:
    """One product, by whichever kernel `linear` would take; returns the phase after it. Gated only where tiles fit."""
    if tiles and fits(inputs, outputs):
        height = tile_height(rows)
        if small(rows, inputs):
            enter(phase)
            alone(phase, x, rows, height, inputs, weight, bias, outputs, gated, out, threads)
        else:
            enter(phase)
            pack(phase, x, rows, inputs, height, packed)
            leave(phase)
            phase += PHASE
            enter(phase)
            products(phase, packed, rows, height, inputs, weight, bias, outputs, gated, out, threads)
    else:
        enter(phase)
        few_rows(phase, x, weight, bias, out, rows, inputs, outputs, kind, threads)
    leave(phase)
    return phase + PHASE


@compiled()
def _copy_rows(tickets: int, x: int, out: int, stride: int, rows: int, size: int) -> None:
    """Takes rows, one at a time; those of `out` lie `stride` bytes apart."""
    while True:
        row = add(tickets, 1)
        if row >= rows:
            break
        copy_row(x + row * size * 4, out + row * stride, size)


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
    cache_kind: int,
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
    inputs: int,
    hidden: int,
    width: int,
    normed: int,
    wide: int,
    query: int,
    packed: int,
    tap: int,
    tap_stride: int,
    result: int,
) -> None:
    """Phase by phase; each is a kernel of the ops that the layer is made of."""
    group, heads, both = num_heads // num_kv_heads, num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
    phase = phases
    if input_norm == 0:
        reads = x
    else:
        reads = normed
        enter(phase)
        if x == 0:
            norm_rows(phase, residual, NO, input_norm, kind, normed, tokens, hidden, eps)
        else:
            norm_rows(phase, x, residual, input_norm, kind, normed, tokens, hidden, eps)
        leave(phase)
        phase += PHASE
    if tap != 0:
        enter(phase)
        _copy_rows(phase, residual, tap, tap_stride, tokens, hidden)
        leave(phase)
        phase += PHASE
    phase = _linear(phase, packed, reads, qkv, qkv_bias, wide, tokens, inputs, both, NO, kind, tiles, threads)
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
        cache_kind,
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
        cache_kind,
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
        join(phase, tasks, num_tasks, areas, cache_kind, group, num_kv_heads, head_dim, wide)
        leave(phase)
        phase += PHASE
    phase = _linear(phase, packed, wide, out, NO, result, tokens, heads, hidden, NO, kind, tiles, threads)
    enter(phase)
    norm_rows(phase, result, residual, post_norm, kind, normed, tokens, hidden, eps)
    leave(phase)
    phase += PHASE
    if tiles and fits(hidden, width):
        phase = _linear(phase, packed, normed, gate_up, NO, query, tokens, hidden, width, YES, kind, tiles, threads)
    else:
        phase = _linear(phase, packed, normed, gate_up, NO, wide, tokens, hidden, 2 * width, NO, kind, tiles, threads)
        enter(phase)
        gate_rows(phase, wide, query, tokens, width)
        leave(phase)
        phase += PHASE
    phase = _linear(phase, packed, query, down, NO, result, tokens, width, hidden, NO, kind, tiles, threads)


@compiled()
def whole(tiles: int, tokens: int, inputs: int, hidden: int, heads: int, both: int, width: int) -> bool:
    """Whether one launch serves: at few tokens any, at more where the matrix unit multiplies all of it."""
    fit = fits(inputs, both) and fits(heads, hidden) and fits(hidden, 2 * width) and fits(width, hidden)
    return tokens <= FEW or (tiles != 0 and fit)


@compiled()
def layers_kernel(
    layers: int,
    count: int,
    tap_stride: int,
    x: int,
    residual: int,
    kind: int,
    tiles: int,
    eps: float,
    rope: int,
    positions: int,
    cache_kind: int,
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
    inputs: int,
    hidden: int,
    width: int,
    result: int,
    threads: int,
) -> None:
    """Layers one after the other, each as `decoder_layer`: x is the first's, or 0 for none, result the last's.

    A layer without input_norm is one alone, and x [tokens, inputs] what its q, k and v are made of.

    `layers` [count, 12] int64 holds for each the addresses of its weights and of its keys and values, in
    `decoder_layer`'s order, 0 for none, and that of where to copy the stream that enters it, in rows of tap_stride
    bytes. Tokens pass through a layer some hundreds at a time: what lies between two products stays in the caches, in
    memory that is used again.
    """
    table = carray(pointer(layers), (count, 12), np.int64)
    both, most = (num_heads + 2 * num_kv_heads) * head_dim, max(num_heads * head_dim, width)
    sizes = (hidden, max(both, 2 * width), most, max(most, inputs))
    block = min(tokens, max(_BLOCK[1] // (sum(sizes) * 4) // 32 * 32, _BLOCK[0]))
    space = np.empty(block * (sizes[0] + sizes[1] + sizes[2]) + (block + LANES) * sizes[3], np.float32)
    normed = address(space)
    wide = normed + block * sizes[0] * 4
    query = wide + block * sizes[1] * 4
    memory = (normed, wide, query, query + block * sizes[2] * 4)
    phases = np.empty(16 * PHASE, np.uint8)
    tasks = plan(query_start, seq_lens, rows, num_heads // num_kv_heads, num_kv_heads, 0, block)
    areas = np.empty(tasks[-1, 1] * area(head_dim), np.uint8)
    for layer in range(count):
        for begin in range(0, tokens, block):
            end = min(begin + block, tokens)
            if block < tokens:
                tasks = plan(query_start, seq_lens, rows, num_heads // num_kv_heads, num_kv_heads, begin, end)
                areas = np.empty(tasks[-1, 1] * area(head_dim), np.uint8)
            phases[:] = 0
            at = begin * hidden * 4
            input_norm, qkv, qkv_bias, q_norm, k_norm, out, post_norm, gate_up, down, keys, values, tap = table[layer]
            weights = (input_norm, qkv, qkv_bias, q_norm, k_norm, out, post_norm, gate_up, down, kind, tiles)
            cache = (rope, positions + begin * 8, keys, values, cache_kind, cache_slot + begin * 8)
            reads = (address(tasks), tasks[-1, 0], address(areas), tasks[-1, 1], block_table, max_blocks, block_size)
            shape = (num_heads, num_kv_heads, head_dim, scale, end - begin, tasks[-1, 3], inputs, hidden, width)
            start = (address(phases), threads, x + begin * inputs * 4 if x != 0 else x, residual + at)
            tapped = (tap + begin * tap_stride if tap != 0 else tap, tap_stride)
            parallel(_layer, threads, (*start, *weights, eps, *cache, *reads, *shape, *memory, *tapped, result + at))
        x = result  # read by the next layer before it writes there
    keep(tasks)
    keep(areas)
    keep(phases)
    keep(space)
