"""Root-mean-square norm over the last dimension, alone or after a residual addition.

x and residual [..., H] of one type; weight [H] of any type. Each returns weight * x / sqrt(mean(x^2) + eps),
computed in float32 and given in x's type (Zhang and Sennrich, 2019, as Llama and Qwen apply it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    upcast = x.float()
    normed = upcast * torch.rsqrt(upcast.square().mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to residual in place, then norms residual."""
    return rms_norm_reference(residual.add_(x), weight, eps)


RMS_NORM = Op("rms_norm", rms_norm_reference)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    add_rms_norm_reference,
    outputs=("residual",),
)
