"""Logits divided by their requests' temperatures, in place; rows of temperature 0 keep their bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op


def divide_logits_reference(
    logits: Tensor,  # [L, V] float32, in place
    temperature: Tensor,  # [S] float32
    slot: Tensor,  # [L] int64
) -> Tensor:
    """`logits`."""
    own = temperature[slot]
    return logits.div_(torch.where(own == 0, 1.0, own)[:, None])


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for rows, size in ((1, 5), (33, 70), (7, 4999)):
        yield {
            "logits": (torch.randn((rows, size), generator=generator) * 9).to(device),
            "temperature": torch.tensor([0.0, 0.7, 1.0, 2.5]).to(device),
            "slot": (torch.arange(1, rows + 1) % 4).to(device),
        }


DIVIDE_LOGITS = Op(
    name="divide_logits",
    reference=divide_logits_reference,
    kernels=("cuda",),
    examples=_examples,
    outputs=("logits",),
    tolerance=0.0,
    why="a quotient is rounded once, and what is drawn from it must not depend on where",
)
