"""`kernels.decoder_layer` on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.cpu import amx
from outrider.kernels.cpu.addresses import address, heads_of, rows_of
from outrider.kernels.cpu.emit import BFLOAT16, KIND
from outrider.kernels.cpu.layer_phases import Shape
from outrider.kernels.cpu.layer_stack import FEW, few_tokens, many_tokens
from outrider.kernels.cpu.linear import FEW as FEW_ROWS
from outrider.kernels.cpu.threads import num_threads
from outrider.kernels.decoder_layer import layers_by_ops
from outrider.kernels.records import LayerWeights
from outrider.tensors import PagedRows


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
        scale: float,
    ) -> None:
        tensors = [(*layer, *cache) for layer, cache in zip(layers, caches, strict=True)]
        first, (keys, _) = layers[0], caches[0]
        for one in tensors:
            for given, other in zip(one, tensors[0], strict=True):
                assert given is None or other is None or (given.shape == other.shape and given.dtype == other.dtype)
                assert given is None or given.is_contiguous()
        self._by_ops = layers_by_ops(lambda op: op.on("cpu"), layers, caches, eps, scale)
        table = [[*(address(tensor) for tensor in one), 0] for one in tensors]
        self._table = np.array(table, np.int64)
        self._layers, self._layer_bytes = self._table.ctypes.data, self._table.strides[0]
        self._copies = False  # whether the table names places for the stream that enters a layer
        _, num_kv_heads, _, head_dim = keys.shape
        num_heads = len(first.qkv) // head_dim - 2 * num_kv_heads
        kind = KIND[first.qkv.dtype]
        tiles = amx.AVAILABLE and kind == BFLOAT16
        hidden, width = first.down.shape
        # but for the address of `rope` and the stride of `features`, which are those of the last call
        self._shape = Shape(
            kind, int(tiles), first.qkv.shape[1], hidden, width, 0, 0, eps, scale, heads_of(num_heads, *caches[0])
        )
        self._all_tiled = tiles and all(
            amx.fits(weight.shape[1], weight.shape[0]) for weight in (first.qkv, first.out, first.gate_up, first.down)
        )

    def __call__(
        self,
        first: int,
        last: int,
        x: Tensor | None,
        residual: Tensor,
        rope: Tensor,
        rows: PagedRows,
        aux_layers: Sequence[int] = (),
        features: Tensor | None = None,
    ) -> Tensor | None:
        """Runs layers first:last, at least one. x is what the layer before gave; see `decoder_layer`.

        `features` [T, len(aux_layers) * H] is filled with the stream as it enters each of aux_layers, side by side.
        """
        tokens = residual.shape[0]
        # one launch serves few tokens, and more where the matrix unit multiplies all of it
        if tokens > FEW_ROWS and not self._all_tiled:
            return self._by_ops(first, last, x, residual, rope, rows, aux_layers, features)
        assert residual.is_contiguous() and (x is None or x.is_contiguous())
        result = torch.empty_like(residual)
        stride = 0
        if self._copies:  # where the last call wrote to may be gone
            self._table[:, -1] = 0
            self._copies = False
        if features is not None:
            assert features.is_contiguous() and features.dtype == torch.float32
            stride, self._copies = features.shape[1] * 4, True
            for index, layer in enumerate(aux_layers):
                if first <= layer < last:
                    self._table[layer, -1] = features.data_ptr() + index * residual.shape[1] * 4
        shape = self._shape
        if shape.rope != rope.data_ptr() or shape.aux_stride != stride:
            shape = self._shape = shape._replace(rope=rope.data_ptr(), aux_stride=stride)
        layers = self._layers + first * self._layer_bytes
        at = 0 if x is None else x.data_ptr(), residual.data_ptr(), result.data_ptr()
        run = few_tokens if tokens <= FEW else many_tokens
        run.launch(layers, last - first, shape, rows_of(rows), *at, num_threads())
        return result


def decoder_layer_cpu(
    x: Tensor | None,
    residual: Tensor,
    weights: LayerWeights,
    eps: float,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
) -> Tensor | None:
    """One layer alone, as a stack of one."""
    stack = DeviceLayerStack([weights], [(key_cache, value_cache)], eps, scale)
    return stack(0, 1, x, residual, rope, rows)
