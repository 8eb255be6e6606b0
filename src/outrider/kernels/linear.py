"""x @ weight.T + bias.

x [T, I] float32 on a CPU, of the weight's type on CUDA; weight [O, I] in its stored type; bias [O] of that type or
None. Returns [T, O] of x's type, or float32 if `upcast`, accumulated in float32.

On a CPU a row's result does not depend on the rows beside it, to the last bit: for any number of rows where `cpu.amx`
takes the weight, and up to 32 rows elsewhere. Above that it is torch's float32 product, faster and not so strict.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.op import Op


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
    if upcast and x.is_cuda and x.dtype != torch.float32 and bias is None:  # without a float32 copy of the weight
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    x = x.float() if upcast else x
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


LINEAR = Op(
    "linear",
    linear_reference,
    tolerance_16bit=1e-2,
    why="cuBLAS may add up parts of a product in 16 bits",
)
