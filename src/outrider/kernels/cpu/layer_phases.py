"""The CPU's decoder layer: the kernels of the ops that it is made of, as phases of one launch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from outrider.kernels.cpu.activation import gate_rows
from outrider.kernels.cpu.addresses import Heads, Norms, Product, Rows
from outrider.kernels.cpu.amx import alone, fits, pack, products, small, tile_height
from outrider.kernels.cpu.attention_tasks import Plan, attend, join
from outrider.kernels.cpu.emit import LANES, NO, YES, copy_row
from outrider.kernels.cpu.jit import compiled, larger, pointer
from outrider.kernels.cpu.linear import few_rows
from outrider.kernels.cpu.norm import norm_rows
from outrider.kernels.cpu.rope import rope_tokens
from outrider.kernels.cpu.threads import PHASE, add, enter, leave

LAYER = 12 * 8  # bytes of a layer in the table


class Shape(NamedTuple):
    """What all layers of a stack have in common."""

    kind: int  # of the weights
    tiles: int  # whether the matrix unit may be used
    inputs: int
    hidden: int
    width: int
    aux_stride: int
    rope: int
    eps: float
    scale: float
    heads: Heads


class Memory(NamedTuple):
    """Where activations lie between two products."""

    normed: int
    projected: int
    gated: int
    packed: int


@compiled()
def _linear(
    phase: int, packed: int, x: int, product: Product, out: int, rows: int, gated: int, tiles: int, threads: int
) -> int:
    """One product, by whichever kernel `linear` would take; returns the phase after it. Gated only where tiles fit."""
    inputs = product.inputs
    if tiles and fits(inputs, product.outputs):
        height = tile_height(rows)
        if small(rows, inputs):
            enter(phase)
            alone(phase, x, rows, height, product, gated, out, threads)
        else:
            enter(phase)
            pack(phase, x, rows, inputs, height, packed)
            leave(phase)
            phase += PHASE
            enter(phase)
            products(phase, packed, rows, height, product, gated, out, threads)
    else:
        enter(phase)
        few_rows(phase, x, product, out, rows, threads)
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
    rows: Rows,
    x: int,
    residual: int,
    first_token: int,  # of these, among those of the whole step
    memory: Memory,
    query: int,
) -> int:
    """A layer up to its keys and values in the cache; returns the phase after it."""
    weights = carray(pointer(layer), (12,), np.int64)
    input_norm, qkv, qkv_bias, aux = weights[0], weights[1], weights[2], weights[11]
    kind, hidden, heads, tokens = shape.kind, shape.hidden, shape.heads, rows.num_tokens
    if input_norm == 0:
        reads = x
    else:
        reads = memory.normed
        enter(phase)
        if x == 0:
            norm_rows(phase, residual, NO, input_norm, kind, reads, tokens, hidden, shape.eps)
        else:
            norm_rows(phase, x, residual, input_norm, kind, reads, tokens, hidden, shape.eps)
        leave(phase)
        phase += PHASE
    if aux != 0:
        enter(phase)
        _copy_rows(phase, residual, aux + first_token * shape.aux_stride, shape.aux_stride, tokens, hidden)
        leave(phase)
        phase += PHASE
    both = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    product = Product(qkv, qkv_bias, shape.inputs, both, kind)
    phase = _linear(phase, memory.packed, reads, product, memory.projected, tokens, NO, shape.tiles, threads)
    enter(phase)
    norms = Norms(weights[3], weights[4], kind, shape.eps)
    rope_tokens(phase, memory.projected, norms, shape.rope, rows, weights[9], weights[10], heads, query)
    leave(phase)
    return phase + PHASE


@compiled()
def from_attention(
    phase: int,
    threads: int,
    layer: int,
    shape: Shape,
    rows: Rows,
    plan: Plan,
    areas: int,
    residual: int,
    memory: Memory,
    query: int,
    result: int,
) -> None:
    """What follows in a layer, from attention on."""
    weights = carray(pointer(layer), (12,), np.int64)
    out, post_norm, gate_up, down = weights[5], weights[6], weights[7], weights[8]
    hidden, width, heads, kind, tokens = shape.hidden, shape.width, shape.heads, shape.kind, rows.num_tokens
    normed, projected, gated, packed = memory
    enter(phase)
    attend(phase, plan, areas, query, weights[9], weights[10], rows, heads, shape.scale, projected, tokens)
    leave(phase)
    phase += PHASE
    if plan.num_areas > 0:
        enter(phase)
        join(phase, plan, areas, heads, projected)
        leave(phase)
        phase += PHASE
    product = Product(out, NO, heads.num_heads * heads.head_dim, hidden, kind)
    phase = _linear(phase, packed, projected, product, result, tokens, NO, shape.tiles, threads)
    enter(phase)
    norm_rows(phase, result, residual, post_norm, kind, normed, tokens, hidden, shape.eps)
    leave(phase)
    phase += PHASE
    if shape.tiles and fits(hidden, width):
        product = Product(gate_up, NO, hidden, width, kind)
        phase = _linear(phase, packed, normed, product, gated, tokens, YES, shape.tiles, threads)
    else:
        product = Product(gate_up, NO, hidden, 2 * width, kind)
        phase = _linear(phase, packed, normed, product, projected, tokens, NO, shape.tiles, threads)
        enter(phase)
        gate_rows(phase, projected, gated, tokens, width)
        leave(phase)
        phase += PHASE
    _linear(phase, packed, gated, Product(down, NO, width, hidden, kind), result, tokens, NO, shape.tiles, threads)


@compiled()
def spaces(tokens: int, shape: Shape) -> Memory:
    """Bytes that so many tokens' activations take."""
    heads, query = shape.heads, shape.heads.num_heads * shape.heads.head_dim
    both, max_width = query + 2 * heads.num_kv_heads * heads.head_dim, larger(query, shape.width)
    projected, packed = larger(both, 2 * shape.width), (tokens + LANES) * larger(max_width, shape.inputs)
    return Memory(tokens * shape.hidden * 4, tokens * projected * 4, tokens * max_width * 4, packed * 4)


@compiled()
def space(tokens: int, shape: Shape) -> int:
    """All of them together."""
    normed, projected, gated, packed = spaces(tokens, shape)
    return normed + projected + gated + packed


@compiled()
def layout(memory: int, tokens: int, shape: Shape) -> Memory:
    """Activations side by side in a space."""
    sizes = spaces(tokens, shape)
    projected = memory + sizes.normed
    gated = projected + sizes.projected
    return Memory(memory, projected, gated, gated + sizes.gated)
