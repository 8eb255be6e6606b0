"""Per-head norms, rotation and cache write: the op between the qkv product and attention.

    qkv [T, (Hq + 2*Hkv) * D]   query heads, then key heads, then value heads
    norms                       RMSNorm weights [D] of each head (Qwen3), or None (Llama)
    rope [max_len, D]           float32, for each position the cosines of the D/2 frequencies, then their sines
    positions [T]               int64
    cache_slot [T]              int64, block * block_size + offset where a token's key and value go; -1: nowhere
    key_cache, value_cache      [num_blocks, Hkv, block_size, D]

Element i of a head turns with element i + D/2 (the "rotate_half" form; Su et al., 2021). No two tokens share a slot. A
bfloat16 cache holds keys and values rounded to the nearest, halves to even; on a CPU a cache is bfloat16 or float32.
A value with a NaN or inf is stored as zeros, and its key as NaN. So queries that see the token get NaN, and no others:
attention multiplies what a query does not see by 0.
Returns the turned query [T, Hq, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.norm import rms_norm_reference
from outrider.kernels.op import Op
from outrider.kernels.records import HeadNorms
from outrider.tensors import PagedRows


def rope_store_reference(
    qkv: Tensor, norms: HeadNorms, rope: Tensor, rows: PagedRows, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    _, num_kv_heads, _, head_dim = key_cache.shape
    heads = qkv.reshape(len(qkv), -1, head_dim)
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms.q is not None:
        query = rms_norm_reference(query, norms.q, norms.eps)
    if norms.k is not None:
        key = rms_norm_reference(key, norms.k, norms.eps)
    angles = rope[rows.positions].unsqueeze(1)
    is_finite = value.to(value_cache.dtype).isfinite().all(dim=-1, keepdim=True)
    _store(torch.where(is_finite, _rotate(key, angles), torch.nan), key_cache, rows.cache_slot)
    _store(torch.where(is_finite, value, 0), value_cache, rows.cache_slot)
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


ROPE_STORE = Op(
    "rope_store",
    rope_store_reference,
    outputs=("key_cache", "value_cache"),
    tolerance=1e-4,
    why="a key between two bfloat16 may be rounded to either",
)
