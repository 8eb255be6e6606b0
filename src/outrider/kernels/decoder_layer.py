"""One layer of a pre-norm decoder with grouped-query attention and a gated MLP, in one launch on a CPU.

x [T, H] is the block before's output, not yet added to the residual stream, or None for the first layer; residual
[T, H] is updated in place. Returns this layer's MLP output [T, H], not yet added: the hidden state after the layer is
residual + what is returned. qkv, qkv_bias, out, gate_up and down are weights as `linear` takes them; input_norm and
post_norm as `rms_norm`; the other arguments as `rope_store` and `paged_attention` take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from outrider.kernels import _amx, activation, attention, linear, norm, rope
from outrider.kernels._decoder_layer import layer_kernel, whole
from outrider.kernels._numba import BFLOAT16, KIND
from outrider.kernels._threads import num_threads
from outrider.kernels.op import Example, Op


def _composed(on: Callable[[Op], Callable[..., Any]]) -> Callable[..., Tensor]:
    """The layer as a sequence of the smaller ops."""
    multiply, rms_norm, add_rms_norm = on(linear.LINEAR), on(norm.RMS_NORM), on(norm.ADD_RMS_NORM)
    silu_mul, rope_store, attend = on(activation.SILU_MUL), on(rope.ROPE_STORE), on(attention.PAGED_ATTENTION)

    def decoder_layer(
        x: Tensor | None,
        residual: Tensor,
        input_norm: Tensor,
        qkv: Tensor,
        qkv_bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        out: Tensor,
        post_norm: Tensor,
        gate_up: Tensor,
        down: Tensor,
        eps: float,
        rope: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_slot: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        num_heads: int,
        scale: float,
    ) -> Tensor:
        normed = rms_norm(residual, input_norm, eps) if x is None else add_rms_norm(x, residual, input_norm, eps)
        cache = key_cache, value_cache
        heads = multiply(normed, qkv, qkv_bias)
        query = rope_store(
            heads, q_norm, k_norm, eps, rope, positions, *cache, cache_slot, num_heads, key_cache.shape[1]
        )
        mixed = attend(query, *cache, block_table, query_start, seq_lens, scale).flatten(1)
        normed = add_rms_norm(multiply(mixed, out), residual, post_norm, eps)
        gated: Tensor = multiply(silu_mul(multiply(normed, gate_up)), down)
        return gated

    return decoder_layer


decoder_layer_reference = _composed(lambda op: op.reference)
decoder_layer_by_ops = _composed(lambda op: op.on("cpu"))


def _decoder_layer_cpu(
    x: Tensor | None,
    residual: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    out: Tensor,
    post_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    rope: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_slot: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    (tokens, hidden), kind = residual.shape, KIND[qkv.dtype]
    (rows, max_blocks), (_, num_kv_heads, block_size, head_dim) = block_table.shape, key_cache.shape
    tiles = _amx.AVAILABLE and kind == BFLOAT16
    if not whole(tiles, tokens, hidden, num_heads * head_dim, len(qkv), down.shape[1]):
        return decoder_layer_by_ops(
            x,
            residual,
            input_norm,
            qkv,
            qkv_bias,
            q_norm,
            k_norm,
            out,
            post_norm,
            gate_up,
            down,
            eps,
            rope,
            positions,
            key_cache,
            value_cache,
            cache_slot,
            block_table,
            query_start,
            seq_lens,
            num_heads,
            scale,
        )
    result = torch.empty_like(residual)
    layer_kernel(
        0 if x is None else x.data_ptr(),
        residual.data_ptr(),
        input_norm.data_ptr(),
        qkv.data_ptr(),
        0 if qkv_bias is None else qkv_bias.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        out.data_ptr(),
        post_norm.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        kind,
        tiles,
        eps,
        rope.data_ptr(),
        positions.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        KIND[key_cache.dtype],
        cache_slot.data_ptr(),
        block_table.data_ptr(),
        query_start.data_ptr(),
        seq_lens.data_ptr(),
        rows,
        max_blocks,
        block_size,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        tokens,
        hidden,
        down.shape[1],
        result.data_ptr(),
        num_threads(),
    )
    return result


def _examples(generator: torch.Generator, device: torch.device) -> Iterator[Example]:
    shapes = (
        (96, 160, 4, 2, 64, torch.bfloat16),
        (64, 67, 4, 4, 64, torch.float32),
        (128, 96, 8, 2, 32, torch.bfloat16),
    )
    for hidden, width, num_heads, num_kv_heads, head_dim, dtype in shapes:
        activation_type = torch.float32 if device.type == "cpu" else dtype

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
            yield {
                "x": draw(tokens, hidden, dtype=activation_type) if width != 67 else None,
                "residual": draw(tokens, hidden, dtype=activation_type),
                "input_norm": draw(hidden, centre=1.0),
                "qkv": draw(heads, hidden, spread=hidden**-0.5),
                "qkv_bias": draw(heads) if width == 96 else None,
                "q_norm": None if width == 96 else draw(head_dim, centre=1.0),
                "k_norm": None if width == 96 else draw(head_dim, centre=1.0),
                "out": draw(hidden, num_heads * head_dim, spread=hidden**-0.5),
                "post_norm": draw(hidden, centre=1.0),
                "gate_up": draw(2 * width, hidden, spread=hidden**-0.5),
                "down": draw(hidden, width, spread=width**-0.5),
                "eps": 1e-6,
                "rope": torch.cat((angles.cos(), angles.sin()), dim=-1).to(device),
                "positions": torch.tensor(position, device=device),
                "key_cache": draw(sum(blocks), num_kv_heads, 16, head_dim),
                "value_cache": draw(sum(blocks), num_kv_heads, 16, head_dim),
                "cache_slot": torch.tensor(slot, device=device),
                "block_table": table.to(device),
                "query_start": starts.to(device, torch.int32),
                "seq_lens": torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
                "num_heads": num_heads,
                "scale": head_dim**-0.5,
            }


DECODER_LAYER = Op(
    "decoder_layer",
    decoder_layer_reference,
    {"cpu": _decoder_layer_cpu},
    examples=_examples,
    outputs=("residual", "key_cache", "value_cache"),
    tolerance=4e-4,
    why="four products deep, and a key between two bfloat16 may be rounded to either",
)
