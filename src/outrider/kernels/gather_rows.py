"""Rows of a matrix by index, and one more row behind its last.

x [T, H] float32 on a CPU; index [R] int64 from 0 to T; extra [1, H], what index T means, or None where no index is T.
Returns [R, H]: a draft head's rows take the target's features, or what stands for features not yet there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op


def gather_rows_reference(x: Tensor, extra: Tensor | None, index: Tensor) -> Tensor:
    return (x if extra is None else torch.cat((x, extra))).index_select(0, index)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for tokens, rows, size in ((1, 1, 64), (5, 8, 67), (3, 40, 256)):
        dtype = torch.float32 if wide else torch.bfloat16
        x, extra = (torch.randn(count, size, generator=generator).to(device, dtype) for count in (tokens, 1))
        yield {"x": x, "extra": extra, "index": torch.randint(tokens + 1, (rows,), generator=generator).to(device)}
        yield {"x": x, "extra": None, "index": torch.randint(tokens, (rows,), generator=generator).to(device)}


GATHER_ROWS = Op(
    "gather_rows",
    gather_rows_reference,
    examples=_examples,
    tolerance=0.0,
    why="copies",
)
