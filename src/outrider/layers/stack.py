"""The layers of a model, one behind the other, run by the fastest backend that declines nothing of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from torch import Tensor

from outrider.cache.layout import LayerCache
from outrider.layers.backend import BoundLayers, choose_backend
from outrider.layers.layer import DecoderLayer
from outrider.layers.parameter import Allocator
from outrider.layers.spec import LayerSpec
from outrider.layers.weight import WeightSlots
from outrider.tensors import StepBatch


class DecoderStack(Sequence[DecoderLayer]):
    """Layers built from their specs."""

    def __init__(self, specs: Sequence[LayerSpec], allocator: Allocator) -> None:
        """Parameters are NaN until `slots()` is filled."""
        self._layers = [DecoderLayer(spec, allocator) for spec in specs]
        formed = [spec if spec.form else replace(spec, form=allocator.form) for spec in specs]
        self.choice = choose_backend(formed, allocator.device)
        self._bound: list[BoundLayers] | None = None  # the layers on the cache of the last step
        self._cache: Sequence[LayerCache] = ()

    def run(
        self,
        x: Tensor | None,
        residual: Tensor,
        batch: StepBatch,
        rope: Tensor,
        cache: Sequence[LayerCache],  # of all layers, whichever are run
        aux_layer_ids: Sequence[int] = (),
        features: Tensor | None = None,
        first: int = 0,
        last: int | None = None,  # None: to the end
    ) -> Tensor | None:
        """Runs layers first:last. Returns what is yet to be added to the residual stream [T, H], None for nothing.

        x is what the layer before returned, or the normed input [T, I] of a first layer that joins two. `residual` is
        written in place. `features` [T, A * H] is filled with the stream that enters each of the A auxiliary layers.
        """
        if self._bound is None or self._cache is not cache:
            self._bound, self._cache = self.choice.backend.bind(self._layers, cache), cache
        last = len(self) if last is None else last
        for start, end, stack in self._bound:
            begin, stop = max(first, start) - start, min(last, end) - start
            if begin < stop:
                own = [index - start for index in aux_layer_ids] if start else aux_layer_ids
                x = stack(begin, stop, x, residual, rope, batch.rows, own, features)
        return x

    def slots(self, prefix: str) -> WeightSlots:
        """The checkpoint's names for every parameter; `prefix` as "model.layers."."""
        found: WeightSlots = {}
        for index, layer in enumerate(self):
            found |= layer.slots(f"{prefix}{index}.")
        return found

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> DecoderLayer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[DecoderLayer]: ...
    def __getitem__(self, index: int | slice) -> DecoderLayer | Sequence[DecoderLayer]:
        return self._layers[index]
