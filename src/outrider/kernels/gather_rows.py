"""Rows of a matrix by index, and one more row behind its last.

x [T, H] float32 on a CPU; index [R] int64 from 0 to T; extra [1, H], what index T means, or None where no index is T.
Returns [R, H]. A draft head's rows take the target's features, or `extra` where the target has not run the position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def gather_rows_reference(x: Tensor, extra: Tensor | None, index: Tensor) -> Tensor:
    return (x if extra is None else torch.cat((x, extra))).index_select(0, index)


GATHER_ROWS = Op(
    "gather_rows",
    gather_rows_reference,
    tolerance=0.0,
    why="copies",
)
