"""Drawing one token from each row of logits, by the Gumbel-max trick with counter-based noise.

    token[l] = argmax over v of   logits[l, v] + gumbel(seed[l], position[l], purpose, v)
                                  logits[l, v]                       where temperature[l] == 0

A drafter with a smaller vocabulary gives ids [V] int64, ascending: column v stands for token ids[v] of the target's
vocabulary. The noise is then that token's, and it is the token that is returned, so that drafter and target share
their noise token by token.

The logits are ready to be sampled from: the temperature processor has divided them (and a drafter
divides its own). `temperature` says only which rows are greedy; None: all of them. With `slot`, the
tables of temperatures and seeds are per slot, and row l is drawn for slot[l]. Sums are rounded to float32;
the first index wins a tie. A token whose logit is -inf is never drawn.

A row whose largest logit is no finite number has no distribution: it holds a NaN or +inf, or nothing but -inf. It
gives NO_TOKEN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.noise import bits_at, gumbel
from outrider.kernels.op import Op

NO_TOKEN = -1
"""In place of a token where there is none to draw."""


def gumbel_argmax_reference(
    logits: Tensor,  # [L, V] float32
    temperature: Tensor | None,  # [L] float32, or [S]
    seed: Tensor,  # [L] int64, or [S]
    position: Tensor,  # [L] int64
    purpose: int,
    ids: Tensor | None = None,  # [V] int64
    slot: Tensor | None = None,  # [L] int64
) -> Tensor:
    """[L] int64, the token drawn from each row, or NO_TOKEN."""
    maximum, column = logits.max(dim=-1)
    if temperature is None:
        return torch.where(maximum.isfinite(), column if ids is None else ids[column], NO_TOKEN)
    if slot is not None:
        temperature, seed = temperature.index_select(0, slot), seed.index_select(0, slot)
    index = torch.arange(logits.shape[1], device=logits.device) if ids is None else ids
    noise = gumbel(bits_at(seed, position, purpose, index))
    greedy = (temperature == 0)[:, None]
    column = torch.where(greedy, logits, logits + noise).argmax(dim=-1)
    return torch.where(maximum.isfinite(), column if ids is None else ids[column], NO_TOKEN)


GUMBEL_ARGMAX = Op(
    name="gumbel_argmax",
    reference=gumbel_argmax_reference,
    tolerance=0.0,
    why="tokens are compared, not numbers",
)
