"""The sizes ops are timed at, and random tensors of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.op import Op
from outrider.layers.parameter import Allocator
from outrider.models.config import ModelConfig

BLOCK_SIZE = 16
COLD, MAX_COPIES = 128 << 20, 32
"""Bytes of weights or cache that calls go round before one comes again, so that no cache still holds it; and how many
copies are made for that at most."""


@dataclass(frozen=True)
class Case:
    """One op on arguments of one size."""

    op: Op[..., Any]
    name: str
    copies: Sequence[dict[str, Any]]  # keyword arguments of one call each: alike, but their weights lie elsewhere
    num_bytes: int  # that a call has to read and write
    operations: int = 0  # floating-point, of products
    kernel: Callable[..., Any] | None = None  # to be timed in place of what the op has for the device


@dataclass(frozen=True)
class Sizes:
    """What the cases are made for."""

    config: ModelConfig
    rows: int  # sequences of a step
    num_drafts: int  # each verifies
    context: int  # tokens each holds
    prefill: int  # tokens of the prompt in the case of prefill; 0: no such case
    device: torch.device
    dtype: torch.dtype  # of the weights

    @property
    def allocator(self) -> Allocator:
        """Whose types activations and cache have."""
        return Allocator.on(self.device, self.dtype)

    def draw(self, *shape: int, dtype: torch.dtype | None = None, spread: float = 1.0) -> Tensor:
        """A random tensor, of the activations' type unless another is given."""
        dtype = dtype or self.allocator.activation_dtype
        return (spread * torch.randn(shape, device=self.device)).to(dtype)

    def weight(self, *shape: int) -> Tensor:
        """A random matrix of the weights' type, or a norm's weight."""
        made = torch.empty(shape, device=self.device, dtype=self.dtype)
        return made.fill_(1.0) if len(shape) == 1 else made.normal_(0.0, 0.02)

    def whole(self, numbers: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers on the device."""
        return torch.tensor(numbers, dtype=dtype, device=self.device)


def num_bytes(*tensors: Tensor | None) -> int:
    """Of all of them together."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def num_copies(size: int) -> int:
    """How often to make weights of so many bytes."""
    return min(max(-(-COLD // size), 1), MAX_COPIES)
