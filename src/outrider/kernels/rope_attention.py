"""Norms, rotation, cache write and attention: `rope_store`, then `paged_attention` of the query that it returns.

Arguments are as those two take them: qkv [T, (Hq + 2*Hkv) * D] in, [T, Hq, D] out, 0 for tokens of no row. key_cache
and value_cache are written. The op is for steps of few query tokens a row.

A row's query tokens are written where its block_table says. With cache_slot -1 nothing is written, since the cache
already holds their keys and values. A kernel may compute these again or read them from the cache.
"""

from __future__ import annotations

from torch import Tensor

from outrider.kernels.attention import paged_attention_reference
from outrider.kernels.op import Op
from outrider.kernels.records import HeadNorms
from outrider.kernels.rope import rope_store_reference
from outrider.tensors import PagedRows


def rope_attention_reference(
    qkv: Tensor,
    norms: HeadNorms,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
) -> Tensor:
    query = rope_store_reference(qkv, norms, rope, rows, key_cache, value_cache)
    return paged_attention_reference(query, key_cache, value_cache, rows, scale)


ROPE_ATTENTION = Op(
    "rope_attention",
    rope_attention_reference,
    ("cuda",),
    outputs=("key_cache", "value_cache"),
    tolerance=1e-3,
    why="a query or a key between two numbers of 16 bits may be rounded to either",
)
