"""What `gpu.rope_attention` is made of: steps of keys from the cache, and of keys computed again."""

from __future__ import annotations

from outrider.kernels.gpu.attention import find_keys, weigh
from outrider.kernels.gpu.rope import load_norm, turn
from outrider.kernels.gpu.triton import dot, jit, round_to, tl


@jit
def load_step(
    key_cache,
    value_cache,
    block,  # [BLOCK_N]
    first_key,
    num_keys,
    head,
    num_kv_heads,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Keys, in halves [BLOCK_N, D / 2], and values [BLOCK_N, D]; zeros from num_keys on."""
    half: tl.constexpr = HEAD_DIM // 2
    key = first_key + tl.arange(0, BLOCK_N)
    part, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at = find_keys(block, key, head, num_kv_heads, BLOCK_SIZE, HEAD_DIM)[:, None]
    in_half = (key < num_keys)[:, None] & (part < half)[None, :]
    low = tl.load(key_cache + at + part[None, :], mask=in_half, other=0, cache_modifier=".cg")
    high = tl.load(key_cache + at + half + part[None, :], mask=in_half, other=0, cache_modifier=".cg")
    inside = (key < num_keys)[:, None] & (column < HEAD_DIM)[None, :]
    return low, high, tl.load(value_cache + at + column[None, :], mask=inside, other=0, cache_modifier=".cg")


@jit
def attend_step(query_low, query_high, low, high, values, seen, scale, top, weight, total, MASKED: tl.constexpr):
    """One step: keys, in halves, and values; `seen` [1 or BLOCK_M, keys], MASKED where there may be none in a row."""
    scores = tl.zeros([query_low.shape[0], low.shape[0]], tl.float32)
    scores = dot(query_low, tl.trans(low.to(query_low.dtype)), scores)
    scores = dot(query_high, tl.trans(high.to(query_low.dtype)), scores)
    scores = tl.where(seen, scores, float("-inf"))
    powers, decay, top, weight = weigh(scores, scale, top, weight, MASKED)
    total = dot(round_to(powers, query_low.dtype), values.to(query_low.dtype), total * decay[:, None])
    return top, weight, total


@jit
def load_angles(rope, position, mask, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Cosines and sines [N, D / 2] of positions [N]."""
    half: tl.constexpr = HEAD_DIM // 2
    part = tl.arange(0, BLOCK_H)
    at = rope + (position * HEAD_DIM)[:, None] + part[None, :]
    inside = mask[:, None] & (part < half)[None, :]
    return tl.load(at, mask=inside, other=0), tl.load(at + half, mask=inside, other=0)


@jit
def own_step(
    query_low,
    query_high,
    qkv,
    k_norm,
    eps,
    rope,
    positions,
    key_cache,
    value_cache,
    cache_slot,
    token,  # [BLOCK_M], of the queries
    first_own,
    first_token,  # of the tile, which are stored
    last_token,
    of_row,  # whether the tokens are of one
    head,
    num_kv_heads,
    scale,
    top,
    weight,
    total,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The step of OWN query tokens' keys and values, computed again as the cache will hold them."""
    half: tl.constexpr = HEAD_DIM // 2
    part, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    own = first_own + tl.arange(0, OWN)
    known = own < last_token
    in_half = known[:, None] & (part < half)[None, :]
    inside = known[:, None] & (column < HEAD_DIM)[None, :]
    at = qkv + ((own.to(tl.int64) * (GROUP + 2) + GROUP) * num_kv_heads + head)[:, None] * HEAD_DIM
    position = tl.load(positions + own, mask=known, other=0)
    slot = tl.load(cache_slot + own, mask=known, other=-1)
    k_low, k_high = load_norm(k_norm, part, half, NORM)
    given_low = tl.load(at + part[None, :], mask=in_half, other=0)
    given_high = tl.load(at + half + part[None, :], mask=in_half, other=0)
    given_value = tl.load(at + num_kv_heads * HEAD_DIM + column[None, :], mask=inside, other=0)
    cos, sin = load_angles(rope, position, known, HEAD_DIM, BLOCK_H)
    low, high = turn(given_low, given_high, k_low, k_high, cos, sin, eps, NORM, HEAD_DIM)
    value = round_to(given_value.to(tl.float32), value_cache.dtype.element_ty).to(tl.float32)
    # see `kernels.rope`: NaN or inf times 0 is NaN
    hidden = (tl.sum(value * 0.0, 1) != 0)[:, None]
    value = round_to(tl.where(hidden, 0.0, value), value_cache.dtype.element_ty)
    low = tl.where(hidden, float("nan"), round_to(low, given_low.dtype).to(tl.float32))
    high = tl.where(hidden, float("nan"), round_to(high, given_low.dtype).to(tl.float32))
    low, high = round_to(low, key_cache.dtype.element_ty), round_to(high, key_cache.dtype.element_ty)

    stored = ((own >= first_token) & (slot >= 0))[:, None]
    there = find_keys(slot // BLOCK_SIZE, slot, head, num_kv_heads, BLOCK_SIZE, HEAD_DIM)[:, None]
    tl.store(key_cache + there + part[None, :], low, mask=in_half & stored)
    tl.store(key_cache + there + half + part[None, :], high, mask=in_half & stored)
    tl.store(value_cache + there + column[None, :], value, mask=inside & stored)

    seen = (own[None, :] <= token[:, None]) & (known & of_row)[None, :]
    value = tl.where(of_row, value, 0.0).to(value.dtype)
    top, weight, total = attend_step(query_low, query_high, low, high, value, seen, scale, top, weight, total, True)
    return top, weight, total
