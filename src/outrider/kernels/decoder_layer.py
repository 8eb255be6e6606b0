"""One layer of a pre-norm decoder with grouped-query attention and a gated MLP, in one launch on a CPU.

x [T, H] is the block before's output, not yet added to the residual stream, or None for the first layer; residual
[T, H] is updated in place. Returns this layer's MLP output [T, H], not yet added: the hidden state after the layer is
residual + what is returned. Without input_norm x [T, I] is what q, k and v are made of, normed already, and nothing is
added to the residual stream before: so a draft head's first layer reads more than the stream. A kernel may add all to
the residual stream itself and return None, nothing left to add. qkv, qkv_bias, out,
gate_up and down are weights as `linear` takes them; input_norm and post_norm as `rms_norm`; the other arguments as
`rope_store` and `paged_attention` take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from outrider.kernels import _amx, activation, attention, linear, norm, rope
from outrider.kernels._decoder_layer import whole
from outrider.kernels._layer_stack import layers_kernel
from outrider.kernels._numba import BFLOAT16, CACHES, KIND, LANES
from outrider.kernels._threads import num_threads
from outrider.kernels.gpu.decoder_layer import GpuLayerStack
from outrider.kernels.op import Example, Op


def _composed(on: Callable[[Op], Callable[..., Any]]) -> Callable[..., Tensor]:
    """The layer as a sequence of the smaller ops."""
    multiply, rms_norm, add_rms_norm = on(linear.LINEAR), on(norm.RMS_NORM), on(norm.ADD_RMS_NORM)
    silu_mul, rope_store, attend = on(activation.SILU_MUL), on(rope.ROPE_STORE), on(attention.PAGED_ATTENTION)

    def decoder_layer(
        x: Tensor | None,
        residual: Tensor,
        input_norm: Tensor | None,
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
        if input_norm is None:
            assert x is not None, "a layer without input_norm is given what it reads"
            normed = x
        else:
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


class LayerWeights(NamedTuple):
    """One layer's, as `decoder_layer` takes them."""

    input_norm: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


def take_taps(layer: int, x: Tensor | None, residual: Tensor, taps: Sequence[int], features: Tensor | None) -> None:
    """Writes the stream that enters a layer, the residual and what the layer before has yet to add, where it is tapped.

    features [T, len(taps) * H], None where nothing is tapped.
    """
    if features is None:
        return
    width = residual.shape[1]
    for place, tap in enumerate(taps):
        if tap == layer:
            out = features[:, place * width : (place + 1) * width]
            if x is None:
                out.copy_(residual)
            else:
                torch.add(residual, x, out=out)


class LayerStack:
    """Layers of one shape with their caches, ready to be run one after the other in one call.

    A call from Python costs some 20 us while weights stream through the caches, as much as the work of a small layer.
    The tensors given are kept, and may be written but not replaced.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        caches: Sequence[tuple[Tensor, Tensor]],  # keys and values
        eps: float,
        num_heads: int,
        scale: float,
    ) -> None:
        self._layers = [(*layer, *cache) for layer, cache in zip(layers, caches, strict=True)]
        first, (keys, _) = layers[0], caches[0]
        for one in self._layers:
            for given, other in zip(one, self._layers[0], strict=True):
                assert given is None or other is None or (given.shape == other.shape and given.dtype == other.dtype)
                assert given is None or given.is_contiguous()
        self._eps, self._num_heads, self._scale = eps, num_heads, scale
        self._table = np.array(
            [[*(0 if tensor is None else tensor.data_ptr() for tensor in one), 0] for one in self._layers], np.int64
        )
        self._heads, self._width, self._kind = len(first.qkv), first.down.shape[1], KIND[first.qkv.dtype]
        self._inputs = first.qkv.shape[1]
        _, self._num_kv_heads, self._block_size, self._head_dim = keys.shape
        self._cache_kind = KIND[keys.dtype]
        assert self._cache_kind in CACHES, f"keys and values in {keys.dtype}"
        assert self._block_size % LANES == 0, f"the CPU kernel reads keys in sixteens: block_size {self._block_size}"

    def __call__(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        rope: Tensor,
        positions: Tensor,
        cache_slot: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        taps: Sequence[int] = (),
        features: Tensor | None = None,
    ) -> Tensor:
        """Runs layers first:last, at least one. x is what the layer before gave; see `decoder_layer`.

        `features` [T, len(taps) * H] is filled with the stream as it enters each tapped layer, side by side.
        """
        (tokens, hidden), (rows, max_blocks) = residual.shape, block_table.shape
        tiles = _amx.AVAILABLE and self._kind == BFLOAT16
        if not whole(tiles, tokens, self._inputs, hidden, self._num_heads * self._head_dim, self._heads, self._width):
            for index, (*weights, keys, values) in enumerate(self._layers[first:last], start=first):
                take_taps(index, x, residual, taps, features)
                at = (rope, positions, keys, values, cache_slot, block_table, query_start, seq_lens)
                x = decoder_layer_by_ops(x, residual, *weights, self._eps, *at, self._num_heads, self._scale)
            assert x is not None
            return x
        assert residual.is_contiguous() and (x is None or x.is_contiguous()) and block_table.is_contiguous()
        result = torch.empty_like(residual)
        stride = 0
        self._table[:, -1] = 0  # what the last call tapped may be gone
        if features is not None:
            assert features.is_contiguous() and features.dtype == torch.float32
            stride = features.shape[1] * 4
            for place, tap in enumerate(taps):
                if first <= tap < last:
                    self._table[tap, -1] = features.data_ptr() + place * hidden * 4
        layers_kernel(
            self._table.ctypes.data + first * self._table.strides[0],
            last - first,
            stride,
            0 if x is None else x.data_ptr(),
            residual.data_ptr(),
            self._kind,
            tiles,
            self._eps,
            rope.data_ptr(),
            positions.data_ptr(),
            self._cache_kind,
            cache_slot.data_ptr(),
            block_table.data_ptr(),
            query_start.data_ptr(),
            seq_lens.data_ptr(),
            rows,
            max_blocks,
            self._block_size,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            self._scale,
            tokens,
            self._inputs,
            hidden,
            self._width,
            result.data_ptr(),
            num_threads(),
        )
        return result


Stack = LayerStack | GpuLayerStack


def layer_stack(
    layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]], eps: float, num_heads: int, scale: float
) -> Stack:
    """The stack for the device that the layers are on."""
    if caches[0][0].device.type == "cpu":
        return LayerStack(layers, caches, eps, num_heads, scale)
    return _gpu_stack(layers, caches, eps, num_heads, scale)


def _gpu_stack(
    layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]], eps: float, num_heads: int, scale: float
) -> GpuLayerStack:
    return GpuLayerStack(
        layers,
        caches,
        eps,
        num_heads,
        scale,
        rms_norm=norm.RMS_NORM.on("cuda"),
        add_rms_norm=norm.ADD_RMS_NORM.on("cuda"),
        silu_mul=activation.SILU_MUL.on("cuda"),
        multiply=linear.LINEAR.on("cuda"),
        rope_store=rope.ROPE_STORE.on("cuda"),
        attend=attention.PAGED_ATTENTION.on("cuda"),
        take_taps=take_taps,
    )


def _layer_on(stack: Callable[..., Stack]) -> Callable[..., Tensor | None]:
    """One layer alone, as a stack of one."""

    def decoder_layer(
        x: Tensor | None,
        residual: Tensor,
        input_norm: Tensor | None,
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
    ) -> Tensor | None:
        weights = LayerWeights(input_norm, qkv, qkv_bias, q_norm, k_norm, out, post_norm, gate_up, down)
        where = rope, positions, cache_slot, block_table, query_start, seq_lens
        return stack([weights], [(key_cache, value_cache)], eps, num_heads, scale)(0, 1, x, residual, *where)

    return decoder_layer


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
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
            example = {
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
            yield example
            if width == 160:
                joined = draw(tokens, 2 * hidden, dtype=activation_type)
                yield {**example, "x": joined, "input_norm": None, "qkv": draw(heads, 2 * hidden, spread=hidden**-0.5)}


DECODER_LAYER = Op(
    "decoder_layer",
    decoder_layer_reference,
    {"cpu": _layer_on(LayerStack), "cuda": _layer_on(_gpu_stack)},
    examples=_examples,
    outputs=("residual", "key_cache", "value_cache"),
    tolerance=1e-3,
    narrow=2e-2,
    why="four products deep, a key between two bfloat16 may be rounded to either, and the interpreter cuts some off",
)
