"""Cutting the tail of each row's distribution: min-p, then top-k, then top-p.

Each asks for the logits at or above some value, so the three together are one threshold a row, and
tokens that tie with the last one kept are kept too: the result is a function of the row's values,
not of how a sort orders equals. All sums are in float64. With `slot`, the tables are per slot, row l
belongs to slot[l], and rows of temperature 0 have everything off.
A row that holds a NaN or +inf keeps one of these, and one of nothing but -inf stays so.

    min-p   keep tokens with at least min_p times the largest probability
    top-k   of those, keep what is no less than the k-th largest logit
    top-p   of those, renormalised, keep the likeliest until their sum reaches top_p, at least one
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def by_row(
    top_k: Tensor, top_p: Tensor, min_p: Tensor, temperature: Tensor | None, slot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row is asked, [L] each."""
    if slot is None or temperature is None:
        return top_k, top_p, min_p
    drawn = temperature[slot] != 0
    return (
        torch.where(drawn, top_k[slot], 0),
        torch.where(drawn, top_p[slot], 1.0),
        torch.where(drawn, min_p[slot], 0.0),
    )


def truncate_reference(
    logits: Tensor,  # [L, V] float32, already divided by the temperature; in place
    top_k: Tensor,  # [L] int32, 0 is off
    top_p: Tensor,  # [L] float32, 1 is off
    min_p: Tensor,  # [L] float32, 0 is off
    temperature: Tensor | None = None,  # [S] float32, given with `slot`; the three above are then [S]
    slot: Tensor | None = None,  # [L] int64
) -> Tensor:
    """`logits`, with -inf for what is cut. Rows with everything off keep their bits."""
    top_k, top_p, min_p = by_row(top_k, top_p, min_p, temperature, slot)
    size = logits.shape[1]
    ordered = logits.sort(dim=-1, descending=True).values
    maximum = ordered[:, :1].double()
    floor = torch.where(min_p == 0, -torch.inf, min_p.double().log())[:, None] + maximum

    k = torch.where((top_k <= 0) | (top_k > size), size, top_k).long()[:, None]
    kth = torch.where(k == size, -torch.inf, ordered.gather(1, k - 1).double())
    floor = torch.maximum(floor, kth)

    weight = torch.where(ordered >= floor, (ordered - maximum).exp(), 0.0)
    before = weight.cumsum(dim=-1) - weight
    wanted = top_p.double()[:, None] * weight.sum(dim=-1, keepdim=True)
    nucleus = ((before < wanted) & (weight > 0)).sum(dim=-1, keepdim=True).clamp(min=1)
    pth = torch.where(top_p[:, None] >= 1, -torch.inf, ordered.gather(1, nucleus - 1).double())
    return logits.masked_fill_(logits < torch.maximum(floor, pth), -torch.inf)


TRUNCATE = Op(
    name="truncate",
    reference=truncate_reference,
    outputs=("logits",),
    tolerance=0.0,
    why="logits are kept or cut, never changed",
)
