"""Packs a step's results into one tensor, for a single copy from the device to the host.

tokens [B, K+1] int64, count [B] int32 of a `Verdict`; drafted [B] int32, how many drafts are waiting, None for none.
out [B, K+3] int64, written: the tokens, their count, the drafts waiting. Its rows may lie in a wider table, whose
further columns stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op


def report_reference(tokens: Tensor, count: Tensor, drafted: Tensor | None, out: Tensor) -> None:
    out[:, :-2].copy_(tokens)
    out[:, -2].copy_(count)
    out[:, -1].zero_() if drafted is None else out[:, -1].copy_(drafted)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, drafts in ((1, 0), (5, 7), (33, 1)):
        counts = torch.randint(0, drafts + 2, (2, rows), generator=generator, dtype=torch.int32).to(device)
        example = {
            "tokens": torch.randint(-1, 151_936, (rows, drafts + 1), generator=generator).to(device),
            "count": counts[0],
            "out": torch.full((rows, drafts + 3), -7, device=device),
        }
        yield {**example, "drafted": counts[1]}
        yield {**example, "drafted": None}
        table = torch.full((rows, drafts + 8), -7, device=device)
        yield {**example, "drafted": counts[1], "out": table[:, : drafts + 3]}


REPORT = Op(
    "report",
    report_reference,
    ("cuda",),
    examples=_examples,
    outputs=("out",),
    tolerance=0.0,
    why="tokens and counts",
)
