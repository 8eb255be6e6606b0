"""Records that contracts and kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from outrider.tensors import PagedRows


class HeadNorms(NamedTuple):
    """RMSNorm weights [D] of each query and key head, None where heads are not normed."""

    q: Tensor | None
    k: Tensor | None
    eps: float


class DraftRows(NamedTuple):
    """The rows that a draft model runs after a step of its target: R tokens, some of which give the B * K drafts."""

    rows: PagedRows  # of R tokens
    length: Tensor  # [B] int32, how many of the K drafts have a position below the model's limit; 0 inside a prompt
    input_ids: Tensor  # [R] int64
    source: Tensor  # [R] int64, the step's query token at the same position; T where the target has not run one
    logits_index: Tensor  # [B * K] int64, the rows that give the drafts; indices past a request's last repeat it
    draft_slot: Tensor  # [B * K] int64, whose draft each is
    draft_position: Tensor  # [B * K] int64, of the token drafted: the first right behind the last committed token


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


def copy_aux_hidden(
    layer: int, x: Tensor | None, residual: Tensor, aux_layers: Sequence[int], features: Tensor | None
) -> None:
    """Copies the stream that enters a layer to its columns of `features`, if it is one of `aux_layers`.

    The stream is the residual and x, what the layer before has yet to add to it, None for nothing. features
    [T, len(aux_layers) * H], None where there are no such layers.
    """
    if features is None:
        return
    width = residual.shape[1]
    for index, aux_layer in enumerate(aux_layers):
        if aux_layer == layer:
            out = features[:, index * width : (index + 1) * width]
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
        rows: PagedRows,
        aux_layers: Sequence[int] = (),
        features: Tensor | None = None,
    ) -> Tensor | None:
        """Runs layers first:last, at least one. x is what the layer before gave; see `decoder_layer`.

        `features` [T, len(aux_layers) * H] is filled with the stream as it enters each of aux_layers, side by side.
        """
