"""Several of the CPU's decoder layers in one call: how threads share them.

Layers run one after the other, each as `decoder_layer`: x is what the first adds, or 0 for none, result what the last
gives. A layer without input_norm is one alone, and x [tokens, inputs] what its q, k and v are made of.

`layers` [count, 12] int64 holds for each the addresses of its weights and of its keys and values, in `LayerWeights`'
order, 0 for none, and that of where to copy the stream that enters it, in rows of aux_stride bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from outrider.kernels.cpu.addresses import Rows
from outrider.kernels.cpu.attention_tasks import Plan, area, plan
from outrider.kernels.cpu.emit import LANES
from outrider.kernels.cpu.jit import Kernel, allocate, clear, free, larger, pointer, smaller, task
from outrider.kernels.cpu.layer_phases import (
    LAYER,
    Memory,
    Shape,
    before_attention,
    from_attention,
    layout,
    space,
)
from outrider.kernels.cpu.threads import PHASE, add, enter, leave, parallel

_LINE = 64  # of a cache
_PHASES = 16 * PHASE  # bytes, of a layer's phases
_PLAN = 5 * 8  # bytes
FEW = 64  # tokens that all threads work on together; with more, each has its own
_CHUNK = 256  # tokens that a thread takes at once: fewer read weights more often, more leave its second cache


@task()
def _together(
    tickets: int,
    phases: int,
    threads: int,
    layer: int,
    shape: Shape,
    rows: Rows,
    x: int,
    residual: int,
    plan: Plan,
    areas: int,
    memory: Memory,
    result: int,
) -> None:
    """One layer of few tokens: all threads share each phase, since weights are what there is to read."""
    query = memory.gated  # which is not there yet when the query is read last
    phase = before_attention(phases, threads, layer, shape, rows, x, residual, 0, memory, query)
    from_attention(phase, threads, layer, shape, rows, plan, areas, residual, memory, query, result)


@Kernel
def few_tokens(
    layers: int, count: int, shape: Shape, rows: Rows, x: int, residual: int, result: int, threads: int
) -> None:
    """A launch for each layer, since threads part at every phase of it anyway."""
    planned = plan(rows, shape.heads, 0, rows.num_tokens)
    areas = allocate(planned.num_areas * area(shape.heads.head_dim))
    activations = allocate(space(rows.num_tokens, shape))
    memory = layout(activations, rows.num_tokens, shape)
    phases = allocate(_PHASES)
    for layer in range(layers, layers + count * LAYER, LAYER):
        clear(phases, _PHASES)
        given = (phases, threads, layer, shape, rows, x, residual, planned, areas, memory, result)
        parallel(_together, threads, given)
        x = result  # read by the next layer before it writes there
    free(phases)
    free(activations)
    free(areas)
    free(planned.tasks)


class Split(NamedTuple):
    """How many tokens are shared out among threads, and what the threads work in."""

    chunk: int  # tokens that a thread takes at once
    plans: int  # of the chunks
    memories: int  # of all threads
    each: int  # bytes of a thread's memory
    areas_at: int  # in that
    query: int


@task()
def _apart(
    tickets: int,
    phases: int,
    threads: int,
    layers: int,
    count: int,
    shape: Shape,
    rows: Rows,
    x: int,
    residual: int,
    split: Split,
    result: int,
) -> None:
    """All layers of many tokens: each thread takes chunks of them through what lies between two attentions.

    What a thread has written it reads again, from its own caches. A chunk goes to the same thread in every layer,
    unless that one is busy elsewhere.
    """
    hidden, query_size, tokens = shape.hidden, shape.heads.num_heads * shape.heads.head_dim, rows.num_tokens
    chunk, plans, memories, each, areas_at, query = split
    me = add(tickets, 1)
    chunks = (tokens + chunk - 1) // chunk
    activations = memories + me * each
    memory = layout(activations, chunk, shape)
    own = allocate(_PHASES)
    for step in range(count + 1):
        phase = phases + step * (PHASE + threads * _LINE)
        enter(phase)
        for turn in range(threads):
            share = (me + turn) % threads
            first, last = chunks * share // threads, chunks * (share + 1) // threads
            while True:
                index = first + add(phase + PHASE + share * _LINE, 1)
                if index >= last:
                    break
                begin = index * chunk
                size, at = smaller(chunk, tokens - begin), begin * hidden * 4
                own_query = query + begin * query_size * 4
                mine = Rows(
                    rows.positions + begin * 8,
                    rows.cache_slot + begin * 8,
                    rows.block_table,
                    rows.query_start,
                    rows.seq_lens,
                    size,
                    rows.num_rows,
                    rows.max_blocks,
                )
                if step > 0:
                    layer, given = layers + (step - 1) * LAYER, carray(pointer(plans + index * _PLAN), (5,), np.int64)
                    planned = Plan(given[0], given[1], given[2], given[3], given[4])
                    clear(own, _PHASES)
                    rest = (activations + areas_at, residual + at, memory, own_query, result + at)
                    from_attention(own, 1, layer, shape, mine, planned, *rest)
                if step < count:
                    layer = layers + step * LAYER
                    reads = result + at if step > 0 else (x + begin * shape.inputs * 4 if x != 0 else x)
                    clear(own, _PHASES)
                    before_attention(own, 1, layer, shape, mine, reads, residual + at, begin, memory, own_query)
        leave(phase)
    free(own)


@Kernel
def many_tokens(
    layers: int, count: int, shape: Shape, rows: Rows, x: int, residual: int, result: int, threads: int
) -> None:
    """One launch for all layers. Chunks are as large as leaves each thread as many, in whole pairs of tiles."""
    tokens, pairs = rows.num_tokens, threads * 2 * LANES
    chunk = smaller((tokens + pairs - 1) // pairs * 2 * LANES, _CHUNK)
    chunks = (tokens + chunk - 1) // chunk
    plans = allocate(chunks * _PLAN)
    table, max_areas = carray(pointer(plans), (chunks, 5), np.int64), 0
    for index in range(chunks):
        begin = index * chunk
        planned = plan(rows, shape.heads, begin, smaller(begin + chunk, tokens))
        for field in range(5):
            table[index, field] = planned[field]
        max_areas = larger(max_areas, planned.num_areas)
    areas_at = space(chunk, shape)
    each = areas_at + max_areas * area(shape.heads.head_dim)
    memories = allocate(threads * each)
    query = allocate(tokens * shape.heads.num_heads * shape.heads.head_dim * 4)
    size = (count + 1) * (PHASE + threads * _LINE)
    phases = allocate(size)
    clear(phases, size)
    split = Split(chunk, plans, memories, each, areas_at, query)
    given = (phases, threads, layers, count, shape, rows, x, residual, split, result)
    parallel(_apart, threads, given)
    free(phases)
    free(query)
    free(memories)
    for index in range(chunks):
        free(table[index, 0])
    free(plans)
