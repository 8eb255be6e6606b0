"""The gate of a SwiGLU block (Shazeer, 2020): silu(first half) * second half of the last dimension.

gate_up [T, 2*I]. Returns [T, I] of its type, computed in float32.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from outrider.kernels.op import Op


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


SILU_MUL = Op("silu_mul", silu_mul_reference)
