"""x @ weight.T + bias.

x [T, I] float32 on a CPU, of the weight's type on CUDA; weight [O, I] in its stored type; bias [O] of that type or
None. Returns [T, O] of x's type, or float32 if `wide`, accumulated in float32.

On a CPU a row's result does not depend on the rows beside it, to the last bit: for any number of rows where `_amx`
takes the weight, and up to 32 rows elsewhere. Above that it is torch's float32 product, faster and not so strict.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.op import Example, Op


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    if wide and x.is_cuda and x.dtype != torch.float32 and bias is None:  # without a float32 copy of the weight
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    x = x.float() if wide else x
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, inputs, outputs in (
            (0, 64, 128),
            (1, 64, 128),
            (1, 67, 5),
            (3, 129, 67),
            (7, 256, 96),
            (17, 256, 131),
            (65, 96, 45),
        ):
            x = torch.randn(rows, inputs, generator=generator)
            weight = torch.randn(outputs, inputs, generator=generator)
            bias = torch.randn(outputs, generator=generator)
            x = x.to(device, torch.float32 if wide else dtype)
            yield {"x": x, "weight": weight.to(device, dtype), "bias": bias.to(device, dtype)}
            yield {"x": x, "weight": weight.to(device, dtype), "wide": True}


LINEAR = Op(
    "linear",
    linear_reference,
    examples=_examples,
    narrow=1e-2,
    why="cuBLAS may add up parts of a product in 16 bits",
)
