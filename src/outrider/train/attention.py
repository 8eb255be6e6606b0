"""Which element of a training row may attend to which, and attention under that rule.

An element is one query: the token after `anchor` as seen from `depth` drafts ahead, at position anchor + depth. It
sees the context, which is the elements of depth 0 up to its anchor, and its own chain, which is the elements of the
same anchor up to its depth; nothing of another document. (P-EAGLE, arXiv 2602.01469; with depth as the step it is the
training-time test of EAGLE-3 too, arXiv 2503.01840.)

On a GPU the rule is a mask function of flex attention and blocks that it rules out are skipped; elsewhere it is a
dense mask. Either is built once a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from outrider.train.functional import upcast

BLOCK = 128
"""Elements a side of a block that flex attention runs or skips."""

Labels = tuple[Tensor, Tensor, Tensor]
"""document, anchor, depth of elements."""


def may_attend(query: Labels, key: Labels) -> Tensor:
    """The rule, for labels of shapes that broadcast."""
    (document, anchor, depth), (key_document, key_anchor, key_depth) = query, key
    context = (key_depth == 0) & (anchor >= key_anchor)
    chain = (anchor == key_anchor) & (depth >= key_depth)
    return (document == key_document) & (context | chain)


@dataclass(frozen=True, slots=True)
class Mask:
    """The rule for a batch of elements: one of the two forms."""

    dense: Tensor | None  # [B, 1, N, N] bool
    blocks: BlockMask | None


def build_mask(document: Tensor, anchor: Tensor, depth: Tensor) -> Mask:
    """From labels [B, N]. On a GPU N must be a multiple of BLOCK."""
    if document.device.type == "cuda":
        return Mask(None, block_mask(document, anchor, depth))
    labels = (document, anchor, depth)
    query = document.unsqueeze(2), anchor.unsqueeze(2), depth.unsqueeze(2)
    key = document.unsqueeze(1), anchor.unsqueeze(1), depth.unsqueeze(1)
    assert all(label.dim() == 2 for label in labels)
    return Mask(may_attend(query, key).unsqueeze(1), None)


def block_mask(document: Tensor, anchor: Tensor, depth: Tensor) -> BlockMask:
    """Blocks that hold an allowed pair, from the bounds of the labels in each: none is missed, a few may be idle."""
    batch, num_elements = document.shape
    assert num_elements % BLOCK == 0, num_elements
    low, high = (
        [reduce(x.view(batch, -1, BLOCK), dim=-1) for x in (document, anchor, depth)]
        for reduce in (torch.amin, torch.amax)
    )
    first, last = ([x.unsqueeze(2) for x in bound] for bound in (low, high))  # of the queries in a block
    key_first, key_last = ([x.unsqueeze(1) for x in bound] for bound in (low, high))
    reaches = last[1] >= key_first[1]
    shared = (first[0] <= key_last[0]) & (key_first[0] <= last[0])
    context = (key_first[2] == 0) & reaches
    chain = reaches & (first[1] <= key_last[1]) & (last[2] >= key_first[2])
    one_document = (first[0] == last[0]) & (key_first[0] == key_last[0])
    whole = shared & one_document & (key_last[2] == 0) & (first[1] >= key_last[1])
    partial = shared & (context | chain) & ~whole

    # int32 labels halve what the kernel reads for every pair
    document, anchor, depth = document.int(), anchor.int(), depth.int()

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(
            (document[row, query], anchor[row, query], depth[row, query]),
            (document[row, key], anchor[row, key], depth[row, key]),
        )

    return BlockMask.from_kv_blocks(*_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=rule)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, n] how many key blocks each query block has, and [B, 1, n, n] which, those first."""
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


class Attention:
    """Attention of elements under a mask; on a GPU through a compiled kernel."""

    def __init__(self, device: torch.device) -> None:
        """Uncompiled, flex attention would hold every score, so it is compiled whatever else is."""
        self._flex: Callable[..., Tensor] | None = None
        if device.type == "cuda":
            self._flex = torch.compile(flex_attention, dynamic=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """q [B, Hq, N, D], k and v [B, Hkv, N, D] -> [B, Hq, N, D]."""
        if mask.dense is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, enable_gqa=True)
        assert self._flex is not None
        return self._flex(q, k, v, block_mask=mask.blocks, enable_gqa=True)

    def with_weight(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """The same, and [B, Hq, N] the logarithm of the sum that the scores were divided by."""
        if mask.dense is None:
            assert self._flex is not None
            out, more = self._flex(q, k, v, block_mask=mask.blocks, enable_gqa=True, return_aux=AuxRequest(lse=True))
            return out, more.lse
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = upcast(q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask.dense, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def join_chain(q: Tensor, out: Tensor, weight: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Adds to attention over the context that to each element's own chain, as one softmax over both.

    q and out [B, Hq, N, D], weight [B, Hq, N] from `with_weight`; keys and values [S, B, Hkv, N, D], the S deeper
    elements that each of the N sees at its own anchor. Returns [B, Hq, N, D].
    """
    batch, num_kv_heads, num_elements, head_dim = keys.shape[1:]
    shape = (batch, num_kv_heads, -1, num_elements)
    grouped = upcast(q).view(*shape, head_dim)
    scores = (grouped * upcast(keys).unsqueeze(3)).sum(-1) * head_dim**-0.5  # [S, B, Hkv, G, N]
    shares = torch.cat((weight.view(1, *shape), scores)).softmax(0).unsqueeze(-1)
    joined = shares[0] * out.view(*shape, head_dim) + (shares[1:] * upcast(values).unsqueeze(3)).sum(0)
    return joined.view(q.shape).to(q.dtype)
