"""Packs a step's results into one tensor, for a single copy from the device to the host.

tokens [B, K+1] int64, count [B] int32 and invalid [B] bool of a `Verdict`; drafted [B] int32, how many drafts are
waiting, None for none. out [B, K+4] int64, written: the tokens, their count, 1 where invalid, the drafts waiting. Its
rows may lie in a wider table, whose further columns stay as they are.
"""

from __future__ import annotations

from torch import Tensor

from outrider.kernels.op import Op


def report_reference(tokens: Tensor, count: Tensor, invalid: Tensor, drafted: Tensor | None, out: Tensor) -> None:
    out[:, :-3].copy_(tokens)
    out[:, -3].copy_(count)
    out[:, -2].copy_(invalid)
    out[:, -1].zero_() if drafted is None else out[:, -1].copy_(drafted)


REPORT = Op(
    "report",
    report_reference,
    ("cuda",),
    outputs=("out",),
    tolerance=0.0,
    why="tokens and counts",
)
