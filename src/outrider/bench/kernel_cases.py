"""The ops of model and sampling, with the arguments a decode step gives them, and what they must read and write."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from outrider.bench.kernel_sizes import BLOCK_SIZE, Case, Sizes, num_bytes, num_copies
from outrider.bench.step_cases import BOOKS, of_logits_rows
from outrider.kernels.activation import SILU_MUL
from outrider.kernels.attention import PAGED_ATTENTION
from outrider.kernels.decoder_layer import DECODER_LAYER
from outrider.kernels.divide_logits import DIVIDE_LOGITS
from outrider.kernels.linear import LINEAR
from outrider.kernels.min_tokens_mask import MIN_TOKENS_MASK
from outrider.kernels.norm import ADD_RMS_NORM, RMS_NORM
from outrider.kernels.records import HeadNorms, LayerWeights
from outrider.kernels.rope import ROPE_STORE
from outrider.kernels.rope_attention import ROPE_ATTENTION
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.kernels.truncate import TRUNCATE
from outrider.models.registry import find_model
from outrider.tensors import PagedRows, Purpose


def cases(sizes: Sizes) -> Iterator[partial[Case]]:
    """Makers of all cases, each to be called when its turn comes: their tensors fill a device together."""
    hidden, intermediate = sizes.config.hidden_size, sizes.config.intermediate_size
    query = sizes.config.num_heads * sizes.config.head_dim
    both = query + 2 * sizes.config.num_kv_heads * sizes.config.head_dim
    for plain in (_rms_norm, _add_rms_norm, _silu_mul):
        yield partial(plain, sizes)
    shapes = {
        "qkv": (both, hidden),
        "out": (hidden, query),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "lm_head": (sizes.config.vocab_size, hidden),
    }
    for name, (outputs, inputs) in shapes.items():
        yield partial(_linear, sizes, name, outputs, inputs)
    yield partial(_rope_store, sizes)
    yield partial(_attention, sizes, "decode", sizes.rows, 1, sizes.context)
    yield partial(_attention, sizes, f"verify {sizes.num_drafts}", sizes.rows, 1 + sizes.num_drafts, sizes.context)
    if sizes.prefill:
        yield partial(_attention, sizes, f"prefill {sizes.prefill}", 1, sizes.prefill, sizes.prefill)
    yield partial(_rope_attention, sizes, "decode", 1)
    yield partial(_rope_attention, sizes, f"verify {sizes.num_drafts}", 1 + sizes.num_drafts)
    yield partial(_decoder_layer, sizes)
    yield partial(_gumbel_argmax, sizes, 0.0)
    yield partial(_gumbel_argmax, sizes, 0.8)
    for processor in (_bar_tokens, _divide_logits, _truncate):
        yield partial(processor, sizes)
    for books in BOOKS:
        yield partial(books, sizes)


def _rms_norm(sizes: Sizes) -> Case:
    x = sizes.draw(sizes.rows, sizes.config.hidden_size)
    given = {"x": x, "weight": sizes.weight(x.shape[1]), "eps": 1e-6}
    return Case(RMS_NORM, "", [given], 2 * x.nbytes)


def _add_rms_norm(sizes: Sizes) -> Case:
    x, residual = (sizes.draw(sizes.rows, sizes.config.hidden_size, spread=0.01) for _ in range(2))
    given = {"x": x, "residual": residual, "weight": sizes.weight(x.shape[1]), "eps": 1e-6}
    return Case(ADD_RMS_NORM, "", [given], 4 * x.nbytes)


def _silu_mul(sizes: Sizes) -> Case:
    gate_up = sizes.draw(sizes.rows, 2 * sizes.config.intermediate_size)
    return Case(SILU_MUL, "", [{"gate_up": gate_up}], gate_up.nbytes * 3 // 2)


def _linear(sizes: Sizes, name: str, outputs: int, inputs: int) -> Case:
    x = sizes.draw(sizes.rows, inputs)
    count = num_copies(outputs * inputs * sizes.dtype.itemsize)
    copies = [{"x": x, "weight": sizes.weight(outputs, inputs)} for _ in range(count)]
    moved = num_bytes(x, copies[0]["weight"]) + sizes.rows * outputs * x.itemsize
    return Case(LINEAR, name, copies, moved, 2 * sizes.rows * outputs * inputs)


def _paged(sizes: Sizes, rows: int, num_query: int, length: int) -> PagedRows:
    """The last tokens of rows that have filled their blocks."""
    blocks = -(-length // BLOCK_SIZE)
    table = torch.randperm(rows * blocks).view(rows, blocks)
    positions = torch.arange(length - num_query, length).repeat(rows)
    row = torch.arange(rows).repeat_interleave(num_query)
    slot = table[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return PagedRows(
        positions=positions.to(sizes.device),
        cache_slot=slot.to(sizes.device),
        block_table=table.to(sizes.device, torch.int32),
        query_start=sizes.whole(range(0, rows * num_query + 1, num_query), torch.int32),
        seq_lens=sizes.whole([length] * rows, torch.int32),
    )


def _caches(sizes: Sizes, num_blocks: int) -> dict[str, Tensor]:
    shape = (num_blocks, sizes.config.num_kv_heads, BLOCK_SIZE, sizes.config.head_dim)
    dtype = sizes.allocator.cache_dtype
    return {name: sizes.draw(*shape, dtype=dtype) for name in ("key_cache", "value_cache")}


def _head_norms(sizes: Sizes) -> HeadNorms:
    config = sizes.config
    normed = find_model(config.architecture).qk_norm
    q, k = (sizes.weight(config.head_dim) if normed else None for _ in range(2))
    return HeadNorms(q, k, 1e-6)


def _rope_table(sizes: Sizes) -> Tensor:
    return sizes.config.rope.table(sizes.context, sizes.config.head_dim, sizes.device)


def _rope_store(sizes: Sizes) -> Case:
    config = sizes.config
    rows = _paged(sizes, sizes.rows, 1, sizes.context)
    qkv = sizes.draw(sizes.rows, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    given = {
        "qkv": qkv,
        "norms": _head_norms(sizes),
        "rope": _rope_table(sizes),
        "rows": rows,
        **_caches(sizes, rows.block_table.numel()),
    }
    return Case(ROPE_STORE, "", [given], 2 * qkv.nbytes)


def _attention(sizes: Sizes, name: str, rows: int, num_query: int, length: int) -> Case:
    config = sizes.config
    num_query, length = min(num_query, length), max(num_query, length)
    paged = _paged(sizes, rows, num_query, length)
    query = sizes.draw(rows * num_query, config.num_heads, config.head_dim)
    scale = config.head_dim**-0.5
    blocks = paged.block_table.numel()
    first = _caches(sizes, blocks)
    rest = [_caches(sizes, blocks) for _ in range(num_copies(num_bytes(*first.values())) - 1)]
    copies = [{"query": query, **caches, "rows": paged, "scale": scale} for caches in (first, *rest)]
    seen = int((paged.positions + 1).sum())
    held = 2 * rows * length * config.num_kv_heads * config.head_dim * sizes.allocator.cache_dtype.itemsize
    operations = 4 * seen * config.num_heads * config.head_dim
    return Case(PAGED_ATTENTION, name, copies, held + 2 * query.nbytes, operations)


def _rope_attention(sizes: Sizes, name: str, num_query: int) -> Case:
    config, length = sizes.config, sizes.context
    num_query = min(num_query, length)
    rows = _paged(sizes, sizes.rows, num_query, length)
    qkv = sizes.draw(len(rows.positions), (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    given = {
        "qkv": qkv,
        "norms": _head_norms(sizes),
        "rope": _rope_table(sizes),
        "rows": rows,
        "scale": config.head_dim**-0.5,
    }
    blocks = rows.block_table.numel()
    first = _caches(sizes, blocks)
    rest = [_caches(sizes, blocks) for _ in range(num_copies(num_bytes(*first.values())) - 1)]
    copies = [{**given, **caches} for caches in (first, *rest)]
    kernel = None
    if sizes.device.type == "cuda":
        # made once, as by a stack of layers
        counters = ROPE_ATTENTION.module("cuda").new_counters(sizes.device, config.num_kv_heads)
        kernel = partial(ROPE_ATTENTION.module("cuda").rope_attention_gpu, counters=counters)
    held = 2 * sizes.rows * length * config.num_kv_heads * config.head_dim * sizes.allocator.cache_dtype.itemsize
    operations = 4 * int((rows.positions + 1).sum()) * config.num_heads * config.head_dim
    return Case(ROPE_ATTENTION, name, copies, held + 2 * qkv.nbytes, operations, kernel)


def _decoder_layer(sizes: Sizes) -> Case:
    config, hidden, intermediate = sizes.config, sizes.config.hidden_size, sizes.config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows, norms = _paged(sizes, sizes.rows, 1, sizes.context), _head_norms(sizes)
    shapes = {
        "input_norm": (hidden,),
        "qkv": (query + 2 * key, hidden),
        "out": (hidden, query),
        "post_norm": (hidden,),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    stored = sum(torch.Size(shape).numel() for shape in shapes.values()) * sizes.dtype.itemsize
    given = {
        "x": sizes.draw(sizes.rows, hidden, spread=0.01),
        "residual": sizes.draw(sizes.rows, hidden),
        "eps": norms.eps,
        "rope": _rope_table(sizes),
        "rows": rows,
        "scale": config.head_dim**-0.5,
    }

    def weights() -> LayerWeights:
        made = {name: sizes.weight(*shape) for name, shape in shapes.items()}
        return LayerWeights(qkv_bias=None, q_norm=norms.q, k_norm=norms.k, **made)

    blocks = rows.block_table.numel()
    copies = [{**given, "weights": weights(), **_caches(sizes, blocks)} for _ in range(num_copies(stored))]
    cache = 2 * sizes.rows * sizes.context * key * sizes.allocator.cache_dtype.itemsize
    operations = 2 * sizes.rows * (hidden * (2 * query + 2 * key + 3 * intermediate) + 2 * sizes.context * query)
    return Case(DECODER_LAYER, "", copies, stored + cache, operations)


def _gumbel_argmax(sizes: Sizes, temperature: float) -> Case:
    given = of_logits_rows(sizes)
    rows = len(given["seed"])
    logits = sizes.draw(rows, sizes.config.vocab_size, dtype=torch.float32, spread=4.0)
    heat = torch.full((rows,), temperature, device=sizes.device)
    call = {"logits": logits, "temperature": heat, **given, "purpose": Purpose.TARGET}
    return Case(GUMBEL_ARGMAX, f"{rows} at {temperature}", [call], logits.nbytes)


def _logits(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Logits of every row that is verified, and whose each is."""
    count = 1 + sizes.num_drafts
    logits = sizes.draw(sizes.rows * count, sizes.config.vocab_size, dtype=torch.float32, spread=4.0)
    return logits, torch.arange(sizes.rows, device=sizes.device).repeat_interleave(count)


def _bar_tokens(sizes: Sizes) -> Case:
    logits, slot = _logits(sizes)
    given = {
        "logits": logits,
        "slot": slot,
        "position": of_logits_rows(sizes)["position"],
        "min_length": sizes.whole([2**30] * sizes.rows, torch.int32),
        "banned": sizes.whole([[1, 2, -1, -1]] * sizes.rows),
    }
    return Case(MIN_TOKENS_MASK, f"{len(logits)} rows", [given], 48 * len(logits))


def _divide_logits(sizes: Sizes) -> Case:
    logits, slot = _logits(sizes)
    given = {"logits": logits, "slot": slot, "temperature": torch.ones(sizes.rows, device=sizes.device)}
    return Case(DIVIDE_LOGITS, f"{len(logits)} rows", [given], 2 * logits.nbytes)


def _truncate(sizes: Sizes) -> Case:
    """Bounds that keep most of the distribution: the op works in place, and the next call is to find as much to do."""
    rows = sizes.rows * (1 + sizes.num_drafts)
    logits = sizes.draw(rows, sizes.config.vocab_size, dtype=torch.float32, spread=4.0)
    given = {
        "logits": logits,
        "top_k": sizes.whole([sizes.config.vocab_size - 1] * rows, torch.int32),
        "top_p": torch.full((rows,), 0.9999, device=sizes.device),
        "min_p": torch.zeros(rows, device=sizes.device),
    }
    return Case(TRUNCATE, f"{rows} rows", [given], 2 * logits.nbytes)
