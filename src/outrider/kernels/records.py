"""Records that contracts and kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DraftRows = tuple[Tensor, ...]
"""query_start [B+1] int32, seq_lens [B] int32, length [B] int32; input_ids, source, positions, cache_slot, all
[num_rows] int64; logits_index, guess_slot, guess_position, all [B * num_drafts] int64.

source: the step's query token whose feature the row takes; T for a mask row. length: how many of num_drafts guesses
have a position below `limit`, 0 inside a prompt. logits_index: the rows that give the guesses, request by request,
the bonus row first, then the num_masks mask rows; indices past them repeat the last. guess_slot and guess_position:
whose guess each is, and where it would stand, the first of a request right behind its last committed token.
"""


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


class LayerStack(Protocol):
    """Layers of one shape with their caches, ready to be run one after the other in one call.

    The tensors given are kept, and may be written but not replaced.
    """

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


def one_layer(stack: Callable[..., LayerStack]) -> Callable[..., Tensor | None]:
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
