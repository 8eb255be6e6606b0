"""The CPU's decoder layer: the kernels of the ops that it is made of, as phases of one launch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from outrider.kernels.cpu.activation import gate_rows
from outrider.kernels.cpu.amx import alone, fits, pack, products, small, tile_height
from outrider.kernels.cpu.attention_tasks import attend, join
from outrider.kernels.cpu.emit import LANES, NO, YES, copy_row
from outrider.kernels.cpu.jit import compiled, pointer
from outrider.kernels.cpu.linear import FEW, few_rows
from outrider.kernels.cpu.norm import norm_rows
from outrider.kernels.cpu.rope import rope_tokens
from outrider.kernels.cpu.threads import PHASE, add, enter, leave


class Shape(NamedTuple):
    """What all layers of a stack have in common."""

    kind: int  # of the weights
    tiles: int  # whether the matrix unit may be used
    rope: int
    cache_kind: int
    block_table: int
    max_blocks: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inputs: int
    hidden: int
    width: int
    tap_stride: int


class Memory(NamedTuple):
    """Where activations lie between two products."""

    normed: int
    wide: int
    gated: int
    packed: int


class Plan(NamedTuple):
    """The attention of some tokens: see `_attention.plan`."""

    tasks: int
    num_tasks: int
    num_areas: int
    num_owned: int


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
def before_attention(
    phase: int,
    threads: int,
    layer: int,
    shape: Shape,
    eps: float,
    x: int,
    residual: int,
    positions: int,
    cache_slot: int,
    tokens: int,
    tapped: int,  # of the tokens before, in the whole step
    memory: Memory,
    query: int,
) -> int:
    """A layer up to its keys and values in the cache; returns the phase after it."""
    input_norm, qkv, qkv_bias, q_norm, k_norm, _, _, _, _, keys, values, tap = carray(pointer(layer), (12,), np.int64)
    kind, tiles, hidden, stride, normed = shape.kind, shape.tiles, shape.hidden, shape.tap_stride, memory.normed
    both = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
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
        _copy_rows(phase, residual, tap + tapped * stride, stride, tokens, hidden)
        leave(phase)
        phase += PHASE
    sizes = (tokens, shape.inputs, both, NO, kind, tiles, threads)
    phase = _linear(phase, memory.packed, reads, qkv, qkv_bias, memory.wide, *sizes)
    enter(phase)
    rope_tokens(
        phase,
        memory.wide,
        q_norm,
        k_norm,
        kind,
        eps,
        shape.rope,
        positions,
        keys,
        values,
        shape.cache_kind,
        cache_slot,
        shape.block_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        query,
        tokens,
    )
    leave(phase)
    return phase + PHASE


@compiled()
def from_attention(
    phase: int,
    threads: int,
    layer: int,
    shape: Shape,
    eps: float,
    scale: float,
    plan: Plan,
    areas: int,
    residual: int,
    tokens: int,
    memory: Memory,
    query: int,
    result: int,
) -> None:
    """What follows in a layer, from attention on."""
    _, _, _, _, _, out, post_norm, gate_up, down, keys, values, _ = carray(pointer(layer), (12,), np.int64)
    hidden, width, head_dim = shape.hidden, shape.width, shape.head_dim
    group, heads = shape.num_heads // shape.num_kv_heads, shape.num_heads * head_dim
    normed, wide, gated, packed = memory
    enter(phase)
    attend(
        phase,
        plan.tasks,
        plan.num_tasks,
        areas,
        query,
        keys,
        values,
        shape.cache_kind,
        shape.block_table,
        shape.max_blocks,
        group,
        shape.num_kv_heads,
        shape.block_size,
        head_dim,
        scale,
        wide,
        plan.num_owned,
        tokens,
    )
    leave(phase)
    phase += PHASE
    if plan.num_areas > 0:
        enter(phase)
        join(phase, plan.tasks, plan.num_tasks, areas, shape.cache_kind, group, shape.num_kv_heads, head_dim, wide)
        leave(phase)
        phase += PHASE
    how = (shape.kind, shape.tiles, threads)
    phase = _linear(phase, packed, wide, out, NO, result, tokens, heads, hidden, NO, *how)
    enter(phase)
    norm_rows(phase, result, residual, post_norm, shape.kind, normed, tokens, hidden, eps)
    leave(phase)
    phase += PHASE
    if shape.tiles and fits(hidden, width):
        phase = _linear(phase, packed, normed, gate_up, NO, gated, tokens, hidden, width, YES, *how)
    else:
        phase = _linear(phase, packed, normed, gate_up, NO, wide, tokens, hidden, 2 * width, NO, *how)
        enter(phase)
        gate_rows(phase, wide, gated, tokens, width)
        leave(phase)
        phase += PHASE
    _linear(phase, packed, gated, down, NO, result, tokens, width, hidden, NO, *how)


@compiled()
def whole(tiles: int, tokens: int, inputs: int, hidden: int, heads: int, both: int, width: int) -> bool:
    """Whether one launch serves: at few tokens any, at more where the matrix unit multiplies all of it."""
    fit = fits(inputs, both) and fits(heads, hidden) and fits(hidden, 2 * width) and fits(width, hidden)
    return tokens <= FEW or (tiles != 0 and fit)


@compiled()
def spaces(tokens: int, shape: Shape) -> Memory:
    """Bytes that so many tokens' activations take."""
    heads, most = shape.num_heads + 2 * shape.num_kv_heads, max(shape.num_heads * shape.head_dim, shape.width)
    wide, packed = max(heads * shape.head_dim, 2 * shape.width), (tokens + LANES) * max(most, shape.inputs)
    return Memory(tokens * shape.hidden * 4, tokens * wide * 4, tokens * most * 4, packed * 4)


@compiled()
def places(space: int, tokens: int, shape: Shape) -> Memory:
    """Activations side by side in a space."""
    sizes = spaces(tokens, shape)
    wide = space + sizes.normed
    gated = wide + sizes.wide
    return Memory(space, wide, gated, gated + sizes.gated)
