"""Norm, rotation and cache write in one kernel: a program takes some heads of a token. See `kernels.rope`.

All is computed in float32 and rounded once, where the reference rounds what the norm gives too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, round_to, tl, wait
from outrider.kernels.records import HeadNorms
from outrider.tensors import PagedRows


@jit
def turn(low, high, norm_low, norm_high, cos, sin, eps, NORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Heads [N, D / 2] twice, normed if asked and rotated, in float32; the others [1 or N, D / 2]."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        root = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        low = norm_low * (low * root)
        high = norm_high * (high * root)
    return low * cos - high * sin, high * cos + low * sin


@jit
def has_no_number(low, high):
    """[N, 1], whether a row of float32 values [N, D / 2] twice holds a NaN or inf: times 0 those are NaN."""
    return (tl.sum(low * 0.0 + high * 0.0, 1) != 0)[:, None]


@jit
def load_norm(norm, column, half: tl.constexpr, NORM: tl.constexpr):
    """The halves of a norm's weight, [1, D / 2] each; zeros where there is none."""
    if NORM:
        low = tl.load(norm + column, mask=column < half, other=0).to(tl.float32)[None, :]
        high = tl.load(norm + half + column, mask=column < half, other=0).to(tl.float32)[None, :]
    else:
        low = tl.zeros(column.shape, tl.float32)[None, :]
        high = low
    return low, high


@jit
def _rope_store_kernel(
    qkv,  # [T, (Hq + 2 * Hkv) * D]
    q_norm,
    k_norm,
    eps,
    rope,
    positions,
    key_cache,
    value_cache,
    cache_slot,
    query,  # [T, Hq, D]
    num_heads,
    num_kv_heads,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of half a head
    PDL: tl.constexpr,
):
    begin(PDL)
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    turns = column < half
    all_heads = num_heads + 2 * num_kv_heads
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    inside = (head < all_heads)[:, None] & turns[None, :]
    q_low, q_high = load_norm(q_norm, column, half, NORM)
    k_low, k_high = load_norm(k_norm, column, half, NORM)
    wait(PDL)
    at = qkv + (token * all_heads + head)[:, None] * HEAD_DIM + column[None, :]
    given_low = tl.load(at, mask=inside, other=0)
    given_high = tl.load(at + half, mask=inside, other=0)
    slot = tl.load(cache_slot + token)
    angles = rope + tl.load(positions + token) * HEAD_DIM + column
    cos = tl.load(angles, mask=turns, other=0)[None, :]
    sin = tl.load(angles + half, mask=turns, other=0)[None, :]

    norm_low, norm_high = tl.where(is_query[:, None], q_low, k_low), tl.where(is_query[:, None], q_high, k_high)
    low, high = turn(given_low, given_high, norm_low, norm_high, cos, sin, eps, NORM, HEAD_DIM)
    turned_low, turned_high = low.to(given_low.dtype), high.to(given_low.dtype)

    to_query = inside & is_query[:, None]
    at = query + (token * num_heads + head)[:, None] * HEAD_DIM + column[None, :]
    tl.store(at, turned_low, mask=to_query)
    tl.store(at + half, turned_high, mask=to_query)

    if slot >= 0:
        kv_head = head - tl.where(is_value, num_heads + num_kv_heads, num_heads)
        cache_row = (slot // BLOCK_SIZE * num_kv_heads + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        there = cache_row[:, None] * HEAD_DIM + column[None, :]
        to_keys, to_values = inside & is_key[:, None], inside & is_value[:, None]
        its_value = qkv + (token * all_heads + head + num_kv_heads)[:, None] * HEAD_DIM + column[None, :]
        v_low = tl.load(its_value, mask=to_keys, other=0)
        v_high = tl.load(its_value + half, mask=to_keys, other=0)
        v_low = tl.where(is_value[:, None], given_low, v_low).to(tl.float32)
        v_high = tl.where(is_value[:, None], given_high, v_high).to(tl.float32)
        v_low = round_to(v_low, value_cache.dtype.element_ty).to(tl.float32)
        v_high = round_to(v_high, value_cache.dtype.element_ty).to(tl.float32)
        hidden = has_no_number(v_low, v_high)
        key_low = tl.where(hidden, float("nan"), turned_low.to(tl.float32))
        key_high = tl.where(hidden, float("nan"), turned_high.to(tl.float32))
        tl.store(key_cache + there, key_low.to(key_cache.dtype.element_ty), mask=to_keys)
        tl.store(key_cache + there + half, key_high.to(key_cache.dtype.element_ty), mask=to_keys)
        tl.store(value_cache + there, tl.where(hidden, 0.0, v_low).to(value_cache.dtype.element_ty), mask=to_values)
        tl.store(
            value_cache + there + half, tl.where(hidden, 0.0, v_high).to(value_cache.dtype.element_ty), mask=to_values
        )


def rope_store_gpu(
    qkv: Tensor, norms: HeadNorms, rope: Tensor, rows: PagedRows, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """`rope_store` in one kernel."""
    tokens, (_, num_kv_heads, block_size, head_dim) = qkv.shape[0], key_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    assert (norms.q is None) == (norms.k is None) and rope.dtype == torch.float32
    assert rows.positions.dtype == rows.cache_slot.dtype == torch.int64
    assert qkv.is_contiguous() and rope.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    query = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    heads = num_heads + 2 * num_kv_heads
    at_once = 4 if tokens <= 256 else 16
    overlap = overlaps(qkv)
    _rope_store_kernel[(tokens, -(-heads // at_once))](
        qkv,
        norms.q,
        norms.k,
        norms.eps,
        rope,
        rows.positions,
        key_cache,
        value_cache,
        rows.cache_slot,
        query,
        num_heads,
        num_kv_heads,
        NORM=norms.q is not None,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_H=at_once,
        BLOCK_D=next_power_of_2(head_dim // 2),
        PDL=overlap,
        num_warps=2 if at_once == 4 else 4,
        **launch(overlap),
    )
    return query
