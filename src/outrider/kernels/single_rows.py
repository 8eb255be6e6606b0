"""The later passes of a draft head that makes its drafts one after another: one row a request.

The first pass gives a request's first guess, from its bonus row. Pass k (1 to K-1) runs guess k at the position of the
bonus row plus k, two before the token that it guesses. A request without a guess k has its row at position 0, and
nothing of that row is written (cache_slot -1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def single_rows_reference(
    logits_index: Tensor,  # [B * K] int64, as `kernels.draft_rows` gives it: a request's first is its bonus row
    guess_position: Tensor,  # [B * K] int64, from there too
    length: Tensor,  # [B] int32, how many guesses a request has positions for
    block_table: Tensor,  # [B, M] int32
    num_drafts: int,  # K, at least 1
    block_size: int,
) -> tuple[Tensor, ...]:
    """query_start [B+1] int32, of every pass; bonus [B] int64, the first pass's rows that guess; then by pass.

    guess_position [K, B] int64, of the first pass too; seq_lens [K-1, B] int32, positions and cache_slot [K-1, B]
    int64, of pass 1 first.
    """
    size, device = length.shape[0], length.device
    first = guess_position.view(size, num_drafts)[:, 0]
    step = torch.arange(num_drafts, device=device)[:, None]
    later = step[1:]
    active = later < length
    own = torch.where(active, first - 2 + later, 0)  # [K-1, B]
    block = block_table.gather(1, (own // block_size).T).T.long()
    cache_slot = torch.where(active, block * block_size + own % block_size, -1)
    query_start = torch.arange(size + 1, dtype=torch.int32, device=device)
    bonus = logits_index.view(size, num_drafts)[:, 0].contiguous()
    return query_start, bonus, first + step, (own + 1).int(), own, cache_slot


SINGLE_ROWS = Op(
    "single_rows",
    single_rows_reference,
    ("cuda",),
    tolerance=0.0,
    why="indices",
)
