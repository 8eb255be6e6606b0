"""`kernels.rope` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.emit import (
    BFLOAT16,
    CACHES,
    KIND,
    SERIAL,
    Emitter,
    Int,
    Vector,
    address,
    copy_row,
    emitted,
    keep,
)
from outrider.kernels.cpu.jit import compiled, pointer
from outrider.kernels.cpu.norm import norm_row
from outrider.kernels.cpu.threads import add, num_threads, parallel


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
def _turn(head: int, norm: int, kind: int, eps: float, angles: int, out: int, head_dim: int) -> None:
    if norm != 0:
        norm_row(head, norm, kind, out, head_dim, eps)
        head = out
    _rotate_row(head, angles, out, head_dim // 2)


@compiled()
def rope_tokens(
    tickets: int,
    qkv: int,
    q_norm: int,
    k_norm: int,
    kind: int,
    eps: float,
    rope: int,
    positions: int,
    key_cache: int,
    value_cache: int,
    cache_kind: int,
    cache_slot: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    query: int,
    tokens: int,
) -> None:
    """Takes tokens, one at a time; a norm of 0 is none."""
    position, slots = carray(pointer(positions), (tokens,), np.int64), carray(pointer(cache_slot), (tokens,), np.int64)
    size = head_dim * 4
    turned = np.empty(head_dim, np.float32)
    while True:
        token = add(tickets, 1)
        if token >= tokens:
            break
        angles = rope + position[token] * size
        source = qkv + token * (num_heads + 2 * num_kv_heads) * size
        for head in range(num_heads):
            out = query + (token * num_heads + head) * size
            _turn(source + head * size, q_norm, kind, eps, angles, out, head_dim)
        if slots[token] >= 0:
            block, offset = slots[token] // block_size, slots[token] % block_size
            for head in range(num_kv_heads):
                place = ((block * num_kv_heads + head) * block_size + offset) * head_dim
                key = source + (num_heads + head) * size
                value = key + num_kv_heads * size
                if cache_kind == BFLOAT16:
                    _turn(key, k_norm, kind, eps, angles, address(turned), head_dim)
                    _round_row(address(turned), key_cache + place * 2, head_dim)
                    _round_row(value, value_cache + place * 2, head_dim)
                else:
                    _turn(key, k_norm, kind, eps, angles, key_cache + place * 4, head_dim)
                    copy_row(value, value_cache + place * 4, head_dim)
    keep(turned)


@compiled()
def _rope_kernel(
    qkv: int,
    q_norm: int,
    k_norm: int,
    kind: int,
    eps: float,
    rope: int,
    positions: int,
    key_cache: int,
    value_cache: int,
    cache_kind: int,
    cache_slot: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    query: int,
    tokens: int,
    threads: int,
) -> None:
    norms = (qkv, q_norm, k_norm, kind, eps, rope, positions)
    cache = (key_cache, value_cache, cache_kind, cache_slot, block_size)
    parallel(rope_tokens, threads, norms + cache + (num_heads, num_kv_heads, head_dim, query, tokens))


def rope_store_cpu(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rope: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_slot: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    tokens, (_, _, block_size, head_dim) = qkv.shape[0], key_cache.shape
    assert qkv.dtype == rope.dtype == torch.float32 and key_cache.dtype == value_cache.dtype
    assert KIND[key_cache.dtype] in CACHES, f"keys and values in {key_cache.dtype}"
    assert positions.dtype == cache_slot.dtype == torch.int64
    assert qkv.is_contiguous() and rope.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    query = torch.empty(tokens, num_heads, head_dim)
    _rope_kernel(
        qkv.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        0 if q_norm is None else KIND[q_norm.dtype],
        eps,
        rope.data_ptr(),
        positions.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        KIND[key_cache.dtype],
        cache_slot.data_ptr(),
        block_size,
        num_heads,
        num_kv_heads,
        head_dim,
        query.data_ptr(),
        tokens,
        num_threads() if qkv.numel() > SERIAL else 1,
    )
    return query
