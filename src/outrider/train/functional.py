"""What the frozen target and the head share: products, norm, rotation, and how functions are compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]

_MAX_VARIANTS = 64
"""Shapes that one compiled function may meet: layers of different widths, segments, chunks."""


def compiler(wanted: bool) -> Callable[[Function], Function]:
    """What to pass functions through: torch.compile for static shapes, or nothing."""
    if not wanted:
        return lambda function: function
    torch._dynamo.config.recompile_limit = _MAX_VARIANTS
    return lambda function: torch.compile(function, dynamic=False)


def upcast(x: Tensor) -> Tensor:
    """At least float32: norms and rotation are computed there."""
    return x if x.dtype == torch.float64 else x.float()


def multiply(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """One product with several matrices [out, in] side by side; weights may be wider than they are multiplied."""
    parts = [weight.to(x.dtype) for weight in weights]
    return F.linear(x, parts[0] if len(parts) == 1 else torch.cat(parts), bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension, in x's type."""
    y = upcast(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(y.dtype)).to(x.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [B, H, N, D] turned by angles [B, 1, N, D/2]; element i turns with element i + D/2."""
    low, high = upcast(heads).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(heads.dtype)


def angles(table: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, N, D/2] from `Rope.table` for positions [B, N]."""
    cos, sin = table[position].unsqueeze(1).chunk(2, dim=-1)
    return cos, sin
