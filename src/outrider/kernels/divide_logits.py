"""Logits divided by their requests' temperatures, in place; rows of temperature 0 keep their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def divide_logits_reference(
    logits: Tensor,  # [L, V] float32, in place
    temperature: Tensor,  # [S] float32
    slot: Tensor,  # [L] int64
) -> Tensor:
    """`logits`."""
    own = temperature[slot]
    return logits.div_(torch.where(own == 0, 1.0, own)[:, None])


DIVIDE_LOGITS = Op(
    name="divide_logits",
    reference=divide_logits_reference,
    kernels=("cuda",),
    outputs=("logits",),
    tolerance=0.0,
    why="a quotient is rounded once, and what is drawn from it must not depend on where",
)
