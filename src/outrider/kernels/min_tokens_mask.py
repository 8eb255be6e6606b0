"""Masks tokens that would end a request before its minimum length.

Row l of the logits predicts the token at position[l] of the request in slot[l]. Where that is below min_length, every
token of the slot's `banned` that is in the vocabulary gets -inf; -1 is padding. All other logits keep their bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def min_tokens_mask_reference(
    logits: Tensor,  # [L, V] float32, in place
    slot: Tensor,  # [L] int64
    position: Tensor,  # [L] int64
    min_length: Tensor,  # [S] int32
    banned: Tensor,  # [S, N] int64
) -> Tensor:
    """`logits`."""
    own = banned[slot]  # [L, N]
    early = (position < min_length[slot])[:, None]
    # The padding must be scattered somewhere; a minimum with +inf leaves that logit as it is.
    bars = early & (own >= 0) & (own < logits.shape[1])
    ceiling = torch.where(bars, -torch.inf, torch.inf)
    return logits.scatter_reduce_(1, torch.where(bars, own, 0), ceiling, "amin")


MIN_TOKENS_MASK = Op(
    name="min_tokens_mask",
    reference=min_tokens_mask_reference,
    kernels=("cuda",),
    outputs=("logits",),
    tolerance=0.0,
    why="logits are kept or banned, never changed",
)
