"""Norms, rotation, cache write and attention: `rope_store`, then `paged_attention` of the query that it returns.

Arguments as those two take them, qkv [T, (Hq + 2*Hkv) * D] in, [T, Hq, D] out, 0 for tokens of no row; key_cache and
value_cache are written. For steps of few query tokens a row. A row's query tokens go where its block_table says that
they lie, or nowhere (cache_slot -1) if their keys and values lie there already: a kernel may make them anew or read
what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.attention import paged_attention_reference
from outrider.kernels.op import Example, Op
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


def rope_attention_case(
    generator: torch.Generator,
    device: torch.device,
    lengths: Sequence[tuple[int, int]],  # query tokens and all tokens of each row
    heads: tuple[int, int, int],  # query heads, key heads, head_dim
    activation: torch.dtype,
    cache: torch.dtype,
    norms: bool = True,
    padding: int = 0,  # query tokens of no row
    rest: float = 2.0,
    block_size: int = 16,
) -> Example:
    """Arguments of one call. Keys and values of the rows' earlier tokens are there, those of every fifth query token
    too, and it goes nowhere; whatever else the caches hold is `rest`, and what a row has no block for is absurd."""
    num_heads, num_kv_heads, head_dim = heads
    tokens = sum(count for count, _ in lengths) + padding
    used = [-(-length // block_size) for _, length in lengths]
    order = torch.randperm(sum(used) + 2, generator=generator)
    table = torch.full((len(lengths), max(used) + 1), 2**31 - 1, dtype=torch.int32)
    positions, slots = torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), -1)
    caches = torch.full((2, sum(used) + 2, num_kv_heads, block_size, head_dim), rest)
    first = 0
    for row, (count, length) in enumerate(lengths):
        blocks, order = order[: used[row]], order[used[row] :]
        table[row, : used[row]] = blocks
        place = torch.arange(length)
        slot = blocks[place // block_size] * block_size + place % block_size
        earlier = slot[: length - count]
        drawn = torch.randn(2, len(earlier), num_kv_heads, head_dim, generator=generator)
        caches[:, earlier // block_size, :, earlier % block_size] = drawn.transpose(0, 1)
        positions[first : first + count], slots[first : first + count] = place[length - count :], slot[length - count :]
        first += count
    angles = torch.rand(max(length for _, length in lengths), head_dim // 2, generator=generator) * 7
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
    weights = (1 + 0.3 * torch.randn(2, head_dim, generator=generator)).to(device, cache)
    starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0)
    rows = PagedRows(
        positions=positions.to(device),
        cache_slot=slots.to(device),
        block_table=table.to(device),
        query_start=starts.to(device, torch.int32),
        seq_lens=torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
    )
    given: dict[str, Any] = {
        "qkv": qkv.to(device, activation),
        "norms": HeadNorms(weights[0] if norms else None, weights[1] if norms else None, 1e-6),
        "rope": torch.cat((angles.cos(), angles.sin()), dim=-1).to(device),
        "key_cache": caches[0].to(device, cache),
        "value_cache": caches[1].to(device, cache),
    }
    nowhere = torch.arange(tokens, device=device) % 5 == 4
    stored = rows._replace(cache_slot=torch.where(nowhere, rows.cache_slot, -1))
    rope_store_reference(**given, rows=stored)
    left = rows._replace(cache_slot=torch.where(nowhere, -1, rows.cache_slot))
    return {**given, "rows": left, "scale": head_dim**-0.5}


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    one, few, many = ((1, 641),), ((1, 33), (5, 5), (0, 7), (3, 40), (1, 1)), ((8, 300), (1, 511), (2, 513), (21, 50))
    for lengths, heads, cache, norms, padding in (
        (one, (4, 2, 128), bfloat16, True, 0),
        (many, (8, 2, 128), bfloat16, True, 0),
        (one, (8, 1, 64), float16, False, 3),
        (one, (2, 2, 64), float32, True, 0),
        (few, (16, 8, 128), bfloat16, True, 2),
        (few, (6, 2, 80), bfloat16, False, 0),
        (few, (7, 1, 48), float16, True, 1),
        (few, (5, 1, 64), float32, False, 2),
        (many, (2, 2, 80), float16, True, 2),
        (many, (3, 1, 64), float32, True, 0),
        (((40, 90), (1, 17)), (8, 1, 64), bfloat16, True, 0),
        (((1, 17),) * 33, (12, 2, 64), bfloat16, True, 5),
    ):
        activation = float32 if wide else cache
        yield rope_attention_case(generator, device, lengths, heads, activation, cache, norms, padding)
    yield rope_attention_case(generator, device, few, (4, 2, 64), float32, bfloat16)


ROPE_ATTENTION = Op(
    "rope_attention",
    rope_attention_reference,
    ("cuda",),
    examples=_examples,
    outputs=("key_cache", "value_cache"),
    tolerance=1e-3,
    why="a query or a key between two numbers of 16 bits may be rounded to either",
)
