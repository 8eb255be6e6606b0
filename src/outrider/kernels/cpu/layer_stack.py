"""Several of the CPU's decoder layers in one call: how threads share them."""

from __future__ import annotations

import numpy as np
from numba import carray

from outrider.kernels.cpu.attention_tasks import area, plan
from outrider.kernels.cpu.emit import LANES, address, keep
from outrider.kernels.cpu.jit import compiled, pointer
from outrider.kernels.cpu.layer_phases import Memory, Plan, Shape, before_attention, from_attention, places, spaces
from outrider.kernels.cpu.threads import PHASE, add, enter, leave, parallel

_ROW = 12 * 8  # bytes of a layer in the table
_LINE = 64  # of a cache
_FEW = 64  # tokens that all threads work on together; with more, each has its own
_CHUNK = 256  # tokens that a thread takes at once: fewer read weights more often, more leave its second cache


@compiled()
def _together(
    tickets: int,
    phases: int,
    threads: int,
    layer: int,
    shape: Shape,
    eps: float,
    scale: float,
    x: int,
    residual: int,
    positions: int,
    cache_slot: int,
    tokens: int,
    plan: Plan,
    areas: int,
    memory: Memory,
    result: int,
) -> None:
    """One layer of few tokens: all threads share each phase, since weights are what there is to read."""
    query = memory.gated  # which is not there yet when the query is read last
    given = (residual, positions, cache_slot, tokens)
    phase = before_attention(phases, threads, layer, shape, eps, x, *given, 0, memory, query)
    from_attention(phase, threads, layer, shape, eps, scale, plan, areas, residual, tokens, memory, query, result)


@compiled()
def _apart(
    tickets: int,
    phases: int,
    threads: int,
    layers: int,
    count: int,
    shape: Shape,
    eps: float,
    scale: float,
    x: int,
    residual: int,
    positions: int,
    cache_slot: int,
    tokens: int,
    chunk: int,
    plans: int,
    memories: int,
    each: int,  # bytes of a thread's memory
    areas_at: int,  # in that
    query: int,
    result: int,
) -> None:
    """All layers of many tokens: each thread takes chunks of them through what lies between two attentions.

    What a thread has written it reads again, from its own caches. A chunk goes to the same thread in every layer,
    unless that one is busy elsewhere.
    """
    hidden, heads = shape.hidden, shape.num_heads * shape.head_dim
    me = add(tickets, 1)
    chunks = (tokens + chunk - 1) // chunk
    space = memories + me * each
    memory = places(space, chunk, shape)
    own = np.zeros(16 * PHASE, np.uint8)
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
                size, at = min(chunk, tokens - begin), begin * hidden * 4
                own_query = query + begin * heads * 4
                if step > 0:
                    layer = layers + (step - 1) * _ROW
                    tasks, num_tasks, num_areas, num_owned = carray(pointer(plans + index * 32), (4,), np.int64)
                    plan = Plan(tasks, num_tasks, num_areas, num_owned)
                    rest = (residual + at, size, memory, own_query, result + at)
                    own[:] = 0
                    from_attention(address(own), 1, layer, shape, eps, scale, plan, space + areas_at, *rest)
                if step < count:
                    layer = layers + step * _ROW
                    reads = result + at if step > 0 else (x + begin * shape.inputs * 4 if x != 0 else x)
                    given = (residual + at, positions + begin * 8, cache_slot + begin * 8, size)
                    own[:] = 0
                    before_attention(address(own), 1, layer, shape, eps, reads, *given, begin, memory, own_query)
        leave(phase)
    keep(own)


@compiled()
def _few(
    query_start: int,
    seq_lens: int,
    rows: int,
    result: int,
    threads: int,
    layers: int,
    count: int,
    shape: Shape,
    eps: float,
    scale: float,
    x: int,
    residual: int,
    positions: int,
    cache_slot: int,
    tokens: int,
) -> None:
    """A launch for each layer, since threads part at every phase of it anyway."""
    group = shape.num_heads // shape.num_kv_heads
    tasks = plan(query_start, seq_lens, rows, group, shape.num_kv_heads, 0, tokens)
    areas = np.empty(tasks[-1, 1] * area(shape.head_dim), np.uint8)
    space = np.empty(sum(spaces(tokens, shape)), np.uint8)
    phases = np.empty(16 * PHASE, np.uint8)
    planned = Plan(address(tasks), tasks[-1, 0], tasks[-1, 1], tasks[-1, 3])
    rest = (planned, address(areas), places(address(space), tokens, shape), result)
    for layer in range(layers, layers + count * _ROW, _ROW):
        phases[:] = 0
        start = (address(phases), threads, layer, shape, eps, scale)
        parallel(_together, threads, (*start, x, residual, positions, cache_slot, tokens, *rest))
        x = result  # read by the next layer before it writes there
    keep(tasks)
    keep(areas)
    keep(space)
    keep(phases)


@compiled()
def _many(
    query_start: int,
    seq_lens: int,
    rows: int,
    result: int,
    threads: int,
    layers: int,
    count: int,
    shape: Shape,
    eps: float,
    scale: float,
    x: int,
    residual: int,
    positions: int,
    cache_slot: int,
    tokens: int,
) -> None:
    """One launch for all layers. Chunks are as large as leaves each thread as many, in whole pairs of tiles."""
    pairs = threads * 2 * LANES
    chunk = min((tokens + pairs - 1) // pairs * 2 * LANES, _CHUNK)
    group = shape.num_heads // shape.num_kv_heads
    tasks = [
        plan(query_start, seq_lens, rows, group, shape.num_kv_heads, begin, min(begin + chunk, tokens))
        for begin in range(0, tokens, chunk)
    ]
    plans = np.empty((len(tasks), 4), np.int64)
    for index, some in enumerate(tasks):
        plans[index] = (address(some), some[-1, 0], some[-1, 1], some[-1, 3])
    areas_at = sum(spaces(chunk, shape))
    each = areas_at + plans[:, 2].max() * area(shape.head_dim)
    memories = np.empty(threads * each, np.uint8)
    query = np.empty(tokens * shape.num_heads * shape.head_dim, np.float32)
    phases = np.zeros((count + 1) * (PHASE + threads * _LINE), np.uint8)
    start = (address(phases), threads, layers, count, shape, eps, scale, x, residual, positions, cache_slot, tokens)
    rest = (chunk, address(plans), address(memories), each, areas_at, address(query), result)
    parallel(_apart, threads, (*start, *rest))
    keep(tasks)
    keep(plans)
    keep(memories)
    keep(query)
    keep(phases)


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
    bytes.
    """
    sizes = (num_heads, num_kv_heads, head_dim, inputs, hidden, width, tap_stride)
    shape = Shape(kind, tiles, rope, cache_kind, block_table, max_blocks, block_size, *sizes)
    given = (threads, layers, count, shape, eps, scale, x, residual, positions, cache_slot, tokens)
    if tokens <= _FEW:
        _few(query_start, seq_lens, rows, result, *given)
    else:
        _many(query_start, seq_lens, rows, result, *given)
