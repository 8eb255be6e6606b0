"""What stands between the qkv product and attention: per-head norms, rotation, and the cache write.

qkv [T, (Hq + 2*Hkv) * D]: query heads, then key heads, then value heads. q_norm and k_norm [D] are RMSNorm
weights applied to each head (Qwen3), or None (Llama). rope [max_len, D] float32 holds for each position the
cosines of the D/2 frequencies, then their sines; element i of a head turns with element i + D/2 (the
"rotate_half" form; Su et al., 2021). positions [T] int64. key_cache and value_cache [num_blocks, Hkv,
block_size, D]; token t's key and value go to cache_slot[t] = block * block_size + offset, nowhere if that
is -1; no two tokens share a slot. A cache of bfloat16 takes them rounded to the nearest, halves to even; on a CPU it
may be that or float32. Returns the turned query [T, Hq, D].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels._numba import (
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
from outrider.kernels._threads import add, num_threads, parallel
from outrider.kernels.gpu.rope import rope_store_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.norm import norm_row, rms_norm_reference
from outrider.kernels.op import Example, Op


def rope_store_reference(
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
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, -1)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None:
        query = rms_norm_reference(query, q_norm, eps)
    if k_norm is not None:
        key = rms_norm_reference(key, k_norm, eps)
    angles = rope[positions].unsqueeze(1)
    _store(_rotate(key, angles), key_cache, cache_slot)
    _store(value, value_cache, cache_slot)
    return _rotate(query, angles)


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.chunk(2, dim=-1)
    low, high = heads.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(heads.dtype)


def _store(heads: Tensor, cache: Tensor, cache_slot: Tensor) -> None:
    """Writes heads [T, Hkv, D] with no mask read by the host: a token that goes nowhere repeats another's write."""
    stored = cache_slot >= 0
    index = torch.arange(len(cache_slot), device=cache_slot.device)
    index = torch.where(stored, index, stored.int().argmax())
    slot = cache_slot[index].clamp(min=0)
    block, offset = slot // cache.shape[2], slot % cache.shape[2]
    old = cache[block, :, offset]
    cache[block, :, offset] = torch.where(stored.any(), heads[index].to(cache.dtype), old)


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


def _rope_store_cpu(
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


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    block_size, max_len = 16, 97
    shapes = ((1, 4, 2, 64), (3, 4, 4, 64), (17, 16, 8, 128), (5, 8, 1, 64))
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, num_heads, num_kv_heads, head_dim in shapes:
            activation = torch.float32 if wide else dtype
            qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
            norms = 1 + torch.randn(2, head_dim, generator=generator).to(device, dtype)
            angles = torch.rand(max_len, head_dim // 2, generator=generator) * 7
            caches = torch.randn(2, 5, num_kv_heads, block_size, head_dim, generator=generator).to(device, dtype)
            slot = torch.randperm(5 * block_size, generator=generator)[:tokens]
            slot[1::3] = -1
            example = {
                "qkv": qkv.to(device, activation),
                "q_norm": norms[0],
                "k_norm": norms[1],
                "eps": 1e-6,
                "rope": torch.cat((angles.cos(), angles.sin()), dim=-1).to(device),
                "positions": torch.randint(max_len, (tokens,), generator=generator).to(device),
                "key_cache": caches[0],
                "value_cache": caches[1],
                "cache_slot": slot.to(device),
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
            }
            yield example
            yield {**example, "q_norm": None, "k_norm": None, "cache_slot": torch.full((tokens,), -1, device=device)}


ROPE_STORE = Op(
    "rope_store",
    rope_store_reference,
    {"cpu": _rope_store_cpu, "cuda": rope_store_gpu},
    examples=_examples,
    outputs=("key_cache", "value_cache"),
    tolerance=1e-4,
    why="a key between two bfloat16 may be rounded to either",
)
