"""The gate of a SwiGLU block (Shazeer, 2020): silu(first half) * second half of the last dimension.

gate_up [T, 2*I]. Returns [T, I] of its type, computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.op import Example, Op


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, width in ((1, 768), (3, 67), (17, 129)):
        for dtype in (torch.float32,) if wide else (torch.bfloat16, torch.float16, torch.float32):
            yield {"gate_up": (8 * torch.randn(rows, 2 * width, generator=generator)).to(device, dtype)}


SILU_MUL = Op("silu_mul", silu_mul_reference, examples=_examples)
