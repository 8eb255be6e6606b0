"""`kernels.rope` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.addresses import Heads, Norms, Rows, heads_of, norms_of, rows_of
from outrider.kernels.cpu.emit import BFLOAT16, SERIAL, Emitter, Int, Vector, copy_row, emitted
from outrider.kernels.cpu.jit import Kernel, allocate, compiled, free, pointer, task
from outrider.kernels.cpu.norm import norm_row
from outrider.kernels.cpu.threads import add, num_threads, parallel
from outrider.kernels.records import HeadNorms
from outrider.tensors import PagedRows


@emitted
def _rotate_row(emitter: Emitter, head: Int, angles: Int, out: Int, half: Int) -> None:
    """out[:2 * half] = head turned by angles, all float32; out may be head."""
    builder = emitter.builder

    def step(index: Int, mask: Vector | None, state: list[Vector]) -> list[Vector]:
        upper = builder.add(index, half)
        low, high = emitter.load(head, index, mask), emitter.load(head, upper, mask)
        cos, sin = emitter.load(angles, index, mask), emitter.load(angles, upper, mask)
        emitter.store(emitter.fma(low, cos, builder.fneg(builder.fmul(high, sin))), out, index, mask)
        emitter.store(emitter.fma(high, cos, builder.fmul(low, sin)), out, upper, mask)
        return []

    emitter.sweep(half, step, [])


@emitted
def _round_row(emitter: Emitter, source: Int, out: Int, size: Int) -> None:
    """out[:size] = source[:size], from float32 to bfloat16."""

    def step(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store_rounded(emitter.load(source, index, mask), out, index, mask)
        return none

    emitter.sweep(size, step, [])


@compiled()
def _turn(head: int, norm: int, norms: Norms, angles: int, out: int, head_dim: int) -> None:
    if norm != 0:
        norm_row(head, norm, norms.kind, out, head_dim, norms.eps)
        head = out
    _rotate_row(head, angles, out, head_dim // 2)


_NOT_SIGN = np.int32(2**31 - 1)
_INF, _ROUNDS_TO_INF = np.int32(0x7F800000), np.int32(0x7F7F8000)


@compiled()
def _hide_value(key: int, value: int, source: int, kind: int, head_dim: int) -> None:
    """Where the value `source` holds a NaN or inf in its stored form: a key of NaN, and zeros for the value."""
    bits = carray(pointer(source), (head_dim,), np.int32)
    max_bits = np.int32(0)
    for i in range(head_dim):
        max_bits = np.int32(max(max_bits, np.int32(bits[i] & _NOT_SIGN)))
    if max_bits < (_ROUNDS_TO_INF if kind == BFLOAT16 else _INF):
        return
    if kind == BFLOAT16:
        int16_key, int16_value = (
            carray(pointer(key), (head_dim,), np.int16),
            carray(pointer(value), (head_dim,), np.int16),
        )
        int16_key[:], int16_value[:] = np.int16(0x7FC0), np.int16(0)
    else:
        int32_key, int32_value = (
            carray(pointer(key), (head_dim,), np.int32),
            carray(pointer(value), (head_dim,), np.int32),
        )
        int32_key[:], int32_value[:] = np.int32(0x7FC00000), np.int32(0)


@task()
def rope_tokens(
    tickets: int, qkv: int, norms: Norms, rope: int, rows: Rows, keys: int, values: int, heads: Heads, query: int
) -> None:
    """Takes tokens, one at a time."""
    position = carray(pointer(rows.positions), (rows.num_tokens,), np.int64)
    slots = carray(pointer(rows.cache_slot), (rows.num_tokens,), np.int64)
    num_heads, num_kv_heads, head_dim, block_size, cache_kind = heads
    size = head_dim * 4
    turned = allocate(size)
    while True:
        token = add(tickets, 1)
        if token >= rows.num_tokens:
            break
        angles = rope + position[token] * size
        source = qkv + token * (num_heads + 2 * num_kv_heads) * size
        for head in range(num_heads):
            out = query + (token * num_heads + head) * size
            _turn(source + head * size, norms.q, norms, angles, out, head_dim)
        if slots[token] >= 0:
            block, offset = slots[token] // block_size, slots[token] % block_size
            for head in range(num_kv_heads):
                index = ((block * num_kv_heads + head) * block_size + offset) * head_dim
                key = source + (num_heads + head) * size
                value = key + num_kv_heads * size
                if cache_kind == BFLOAT16:
                    _turn(key, norms.k, norms, angles, turned, head_dim)
                    _round_row(turned, keys + index * 2, head_dim)
                    _round_row(value, values + index * 2, head_dim)
                    _hide_value(keys + index * 2, values + index * 2, value, cache_kind, head_dim)
                else:
                    _turn(key, norms.k, norms, angles, keys + index * 4, head_dim)
                    copy_row(value, values + index * 4, head_dim)
                    _hide_value(keys + index * 4, values + index * 4, value, cache_kind, head_dim)
    free(turned)


@Kernel
def _rope_kernel(
    qkv: int, norms: Norms, rope: int, rows: Rows, keys: int, values: int, heads: Heads, query: int, threads: int
) -> None:
    parallel(rope_tokens, threads, (qkv, norms, rope, rows, keys, values, heads, query))


def rope_store_cpu(
    qkv: Tensor, norms: HeadNorms, rope: Tensor, rows: PagedRows, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    tokens, (_, num_kv_heads, _, head_dim) = qkv.shape[0], key_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    assert qkv.dtype == rope.dtype == torch.float32 and qkv.is_contiguous() and rope.is_contiguous()
    query = torch.empty(tokens, num_heads, head_dim)
    _rope_kernel.launch(
        qkv.data_ptr(),
        norms_of(norms),
        rope.data_ptr(),
        rows_of(rows),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        heads_of(num_heads, key_cache, value_cache),
        query.data_ptr(),
        num_threads() if qkv.numel() > SERIAL else 1,
    )
    return query
