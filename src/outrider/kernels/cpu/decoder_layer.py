"""`kernels.decoder_layer` on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.cpu import amx
from outrider.kernels.cpu.emit import BFLOAT16, CACHES, KIND, LANES
from outrider.kernels.cpu.layer_phases import whole
from outrider.kernels.cpu.layer_stack import layers_kernel
from outrider.kernels.cpu.threads import num_threads
from outrider.kernels.decoder_layer import layers_by_ops
from outrider.kernels.records import LayerWeights, one_layer


class DeviceLayerStack:
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
        self._by_ops = layers_by_ops(lambda op: op.on("cpu"), layers, caches, eps, num_heads, scale)
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
    ) -> Tensor | None:
        """Runs layers first:last, at least one. x is what the layer before gave; see `decoder_layer`.

        `features` [T, len(taps) * H] is filled with the stream as it enters each tapped layer, side by side.
        """
        (tokens, hidden), (rows, max_blocks) = residual.shape, block_table.shape
        tiles = amx.AVAILABLE and self._kind == BFLOAT16
        if not whole(tiles, tokens, self._inputs, hidden, self._num_heads * self._head_dim, self._heads, self._width):
            where = rope, positions, cache_slot, block_table, query_start, seq_lens
            return self._by_ops(first, last, x, residual, *where, taps, features)
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


decoder_layer_cpu = one_layer(DeviceLayerStack)
