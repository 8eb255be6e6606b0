"""Root-mean-square norm over the last dimension, alone or after a residual addition.

x and residual [..., H] of one type; weight [H] of any type. Each returns weight * x / sqrt(mean(x^2) + eps),
computed in float32 and given in x's type (Zhang and Sennrich, 2019, as Llama and Qwen apply it).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to residual in place, then norms residual."""
    return rms_norm_reference(residual.add_(x), weight, eps)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, width in ((1, 256), (3, 67), (17, 1024)):
            x = torch.randn(rows, width, generator=generator)
            weight = 1 + torch.randn(width, generator=generator)
            x = x.to(device, torch.float32 if wide else dtype)
            yield {"x": x, "weight": weight.to(device, dtype), "eps": 1e-6}


def _add_examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for example in _examples(generator, device, wide):
        x = example["x"]
        residual = torch.randn(x.shape, generator=generator).to(device, x.dtype)
        yield {**example, "residual": residual}


RMS_NORM = Op("rms_norm", rms_norm_reference, examples=_examples)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    add_rms_norm_reference,
    examples=_add_examples,
    outputs=("residual",),
)
