"""Arguments for the ops that layers are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.records import HeadNorms, LayerWeights
from outrider.kernels.rope import rope_store_reference
from outrider.tensors import PagedRows

Example = Mapping[str, Any]


def silu_mul(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, width in ((1, 768), (3, 67), (17, 129)):
        for dtype in (torch.float32,) if wide else (torch.bfloat16, torch.float16, torch.float32):
            yield {"gate_up": (8 * torch.randn(rows, 2 * width, generator=generator)).to(device, dtype)}


def paged_attention(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    block_size = 16
    cases = (  # (query tokens, all tokens) of each row
        ((1, 1),),
        ((1, 33), (5, 5), (3, 40)),
        ((8, 600), (1, 511), (1, 513), (17, 50)),
        ((130, 301), (1, 16)),
    )
    for lengths in cases:
        for num_heads, num_kv_heads, head_dim, cache in (
            (4, 2, 64, torch.float32),
            (4, 2, 64, torch.bfloat16),
            (16, 8, 128, torch.bfloat16),
            (4, 4, 64, torch.float32),
            (8, 1, 64, torch.bfloat16),
            (6, 2, 80, torch.bfloat16),
            (4, 2, 48, torch.float32),
            (8, 2, 128, torch.float32),
        ):
            activation = torch.float32 if wide else torch.bfloat16
            cache = cache if wide else activation
            used = [-(-length // block_size) for _, length in lengths]
            width = max(used) + 1
            order = torch.randperm(sum(used) + 3, generator=generator).int()
            table = torch.full((len(lengths), width), 2**31 - 1, dtype=torch.int32)
            for index, count in enumerate(used):
                table[index, :count], order = order[:count], order[count:]
            shape = (sum(used) + 3, num_kv_heads, block_size, head_dim)
            query_lens = torch.tensor([0, *(count for count, _ in lengths)])
            padding = 2 if len(lengths) == 3 else 0
            query = torch.randn(int(query_lens.sum()) + padding, num_heads, head_dim, generator=generator)
            yield {
                "query": 3 * query.to(device, activation),
                "key_cache": torch.randn(shape, generator=generator).to(device, cache),
                "value_cache": torch.randn(shape, generator=generator).to(device, cache),
                "rows": PagedRows(
                    positions=torch.zeros(len(query), dtype=torch.int64, device=device),
                    cache_slot=torch.full((len(query),), -1, device=device),
                    block_table=table.to(device),
                    query_start=query_lens.cumsum(0).to(device, torch.int32),
                    seq_lens=torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
                ),
                "scale": head_dim**-0.5,
            }


def decoder_layer(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    shapes = (
        (96, 160, 4, 2, 64, torch.bfloat16),
        (64, 67, 4, 4, 64, torch.float32),
        (128, 96, 8, 2, 32, torch.bfloat16),
        (64, 72, 2, 1, 80, torch.bfloat16),
        (64, 96, 3, 1, 128, torch.float32),
    )
    for hidden, width, num_heads, num_kv_heads, head_dim, dtype in shapes:
        activation_type = torch.float32 if wide else dtype

        def draw(*shape: int, dtype: torch.dtype = dtype, centre: float = 0.0, spread: float = 1.0) -> Tensor:
            return (centre + spread * torch.randn(shape, generator=generator)).to(device, dtype)

        for lengths in (((1, 30),), ((1, 17), (5, 21), (2, 530)), ((40, 40), (1, 3))):
            tokens = sum(count for count, _ in lengths)
            heads = (num_heads + 2 * num_kv_heads) * head_dim
            starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0)
            blocks = [-(-length // 16) for _, length in lengths]
            table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
            position: list[int] = []
            slot: list[int] = []
            for row, (count, length) in enumerate(lengths):
                table[row, : blocks[row]] = torch.arange(blocks[row]) + sum(blocks[:row])
                position += range(length - count, length)
                slot += [sum(blocks[:row]) * 16 + place for place in range(length - count, length)]
            angles = torch.rand(max(position) + 1, head_dim // 2, generator=generator) * 7
            rows = PagedRows(
                positions=torch.tensor(position, device=device),
                cache_slot=torch.tensor(slot, device=device),
                block_table=table.to(device),
                query_start=starts.to(device, torch.int32),
                seq_lens=torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
            )
            example: dict[str, Any] = {
                "x": draw(tokens, hidden, dtype=activation_type) if width != 67 else None,
                "residual": draw(tokens, hidden, dtype=activation_type),
                "weights": LayerWeights(
                    input_norm=draw(hidden, centre=1.0),
                    qkv=draw(heads, hidden, spread=hidden**-0.5),
                    qkv_bias=draw(heads) if width == 96 else None,
                    q_norm=None if width == 96 else draw(head_dim, centre=1.0),
                    k_norm=None if width == 96 else draw(head_dim, centre=1.0),
                    out=draw(hidden, num_heads * head_dim, spread=hidden**-0.5),
                    post_norm=draw(hidden, centre=1.0),
                    gate_up=draw(2 * width, hidden, spread=hidden**-0.5),
                    down=draw(hidden, width, spread=width**-0.5),
                ),
                "eps": 1e-6,
                "rope": torch.cat((angles.cos(), angles.sin()), dim=-1).to(device),
                "rows": rows,
                "key_cache": draw(sum(blocks), num_kv_heads, 16, head_dim),
                "value_cache": draw(sum(blocks), num_kv_heads, 16, head_dim),
                "scale": head_dim**-0.5,
            }
            yield example
            if width == 160:
                joined = draw(tokens, 2 * hidden, dtype=activation_type)
                wide_qkv = draw(heads, 2 * hidden, spread=hidden**-0.5)
                yield {**example, "x": joined, "weights": example["weights"]._replace(input_norm=None, qkv=wide_qkv)}


def embed(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, size in ((1, 64), (33, 67)):
            yield {
                "ids": torch.randint(31, (tokens,), generator=generator).to(device),
                "weight": torch.randn(31, size, generator=generator).to(device, stored),
                "dtype": torch.float32 if wide else stored,
            }


def gather_rows(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for tokens, rows, size in ((1, 1, 64), (5, 8, 67), (3, 40, 256)):
        dtype = torch.float32 if wide else torch.bfloat16
        x, extra = (torch.randn(count, size, generator=generator).to(device, dtype) for count in (tokens, 1))
        yield {"x": x, "extra": extra, "index": torch.randint(tokens + 1, (rows,), generator=generator).to(device)}
        yield {"x": x, "extra": None, "index": torch.randint(tokens, (rows,), generator=generator).to(device)}


def join_input(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, size in ((1, 64), (7, 67), (40, 256)):
            hidden = torch.randn(rows, size, generator=generator)
            yield {
                "ids": torch.randint(-2, 31, (rows,), generator=generator).to(device),
                "embedding": torch.randn(31, size, generator=generator).to(device, dtype),
                "hidden": hidden.to(device, torch.float32 if wide else dtype),
                "token_norm": (1 + torch.randn(size, generator=generator)).to(device, dtype),
                "hidden_norm": (1 + torch.randn(size, generator=generator)).to(device, dtype),
                "eps": 1e-6,
            }


def linear(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, inputs, outputs in (
            (0, 64, 128),
            (1, 64, 128),
            (1, 67, 5),
            (3, 129, 65),
            (7, 256, 96),
            (17, 256, 131),
            (65, 96, 45),
        ):
            x = torch.randn(rows, inputs, generator=generator)
            weight = torch.randn(outputs, inputs, generator=generator)
            bias = torch.randn(outputs, generator=generator)
            x = x.to(device, torch.float32 if wide else dtype)
            yield {"x": x, "weight": weight.to(device, dtype), "bias": bias.to(device, dtype)}
            yield {"x": x, "weight": weight.to(device, dtype), "upcast": True}


def rms_norm(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, width in ((1, 256), (3, 67), (17, 1024)):
            x = torch.randn(rows, width, generator=generator)
            weight = 1 + torch.randn(width, generator=generator)
            x = x.to(device, torch.float32 if wide else dtype)
            yield {"x": x, "weight": weight.to(device, dtype), "eps": 1e-6}


def add_rms_norm(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for example in rms_norm(generator, device, wide):
        x = example["x"]
        residual = torch.randn(x.shape, generator=generator).to(device, x.dtype)
        yield {**example, "residual": residual}


def rope_store(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
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
            nobody = torch.zeros(1, dtype=torch.int32, device=device)
            rows = PagedRows(
                positions=torch.randint(max_len, (tokens,), generator=generator).to(device),
                cache_slot=slot.to(device),
                block_table=nobody[:, None],
                query_start=nobody,
                seq_lens=nobody[:0],
            )
            example = {
                "qkv": qkv.to(device, activation),
                "norms": HeadNorms(norms[0], norms[1], 1e-6),
                "rope": torch.cat((angles.cos(), angles.sin()), dim=-1).to(device),
                "rows": rows,
                "key_cache": caches[0],
                "value_cache": caches[1],
            }
            yield example
            yield {
                **example,
                "qkv": with_values_that_are_none(example["qkv"], torch.arange(1, tokens, 2), num_kv_heads, head_dim),
            }
            nowhere = rows._replace(cache_slot=torch.full((tokens,), -1, device=device))
            yield {**example, "norms": HeadNorms(None, None, 1e-6), "rows": nowhere}


def with_values_that_are_none(
    qkv: torch.Tensor, spoilt: torch.Tensor, num_kv_heads: int, head_dim: int
) -> torch.Tensor:
    """A copy in which the values of some heads of the `spoilt` tokens [N] hold one NaN or inf."""
    qkv = qkv.clone()
    value = qkv[:, -num_kv_heads * head_dim :].unflatten(1, (num_kv_heads, head_dim))
    value[spoilt[0::2], 0, head_dim - 1] = torch.nan
    value[spoilt[1::2], num_kv_heads - 1, 1] = -torch.inf
    return qkv


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


def rope_attention(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
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
    for dtype in (bfloat16, float16, float32):
        example = rope_attention_case(generator, device, many, (4, 2, 64), float32 if wide else dtype, dtype)
        # what goes nowhere is in the cache already, as it was before
        stored = (example["rows"].cache_slot >= 0).nonzero()[1::3, 0]
        yield {**example, "qkv": with_values_that_are_none(example["qkv"], stored, 2, 64)}


def scale_hidden(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, size in ((1, 64), (7, 67)):
        dtype = torch.float32 if wide else torch.bfloat16
        for greedy in (False, True):
            yield {
                "x": torch.randn(rows, size, generator=generator).to(device, dtype),
                "temperature": torch.tensor([0.0, 0.7, 1.0, 2.5]).to(device),
                "seed": torch.randint(2**62, (4,), generator=generator).to(device),
                "slot": torch.randint(4, (rows,), generator=generator).to(device),
                "greedy": greedy,
            }
