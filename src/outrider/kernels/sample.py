"""Drawing one token from each row of logits, by the Gumbel-max trick with counter-based noise.

    token[l] = argmax over v of   logits[l, v] + gumbel(seed[l], position[l], purpose, v)
                                  logits[l, v]                       where temperature[l] == 0

A drafter with a smaller vocabulary gives ids [V] int64, ascending: column v stands for token ids[v] of the target's
vocabulary. The noise is then that token's, and it is the token that is returned, so that drafter and target share
their noise token by token.

The logits are ready to be sampled from: the temperature processor has divided them (and a drafter
divides its own). `temperature` says only which rows are greedy; None: all of them. With `slot`, the
tables of temperatures and seeds are per slot, and row l is drawn for slot[l]. Sums are rounded to float32;
the first index wins a tie. A token whose logit is -inf is never drawn while the row has another. Rows
that hold a NaN give an index in range and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from outrider.kernels.noise import bits_at, gumbel
from outrider.kernels.op import Example, Op
from outrider.tensors import Purpose


def gumbel_argmax_reference(
    logits: Tensor,  # [L, V] float32
    temperature: Tensor | None,  # [L] float32, or [S]
    seed: Tensor,  # [L] int64, or [S]
    position: Tensor,  # [L] int64
    purpose: int,
    ids: Tensor | None = None,  # [V] int64
    slot: Tensor | None = None,  # [L] int64
) -> Tensor:
    """[L] int64, the token drawn from each row."""
    if temperature is None:
        column = logits.argmax(dim=-1)
        return column if ids is None else ids[column]
    if slot is not None:
        temperature, seed = temperature.index_select(0, slot), seed.index_select(0, slot)
    index = torch.arange(logits.shape[1], device=logits.device) if ids is None else ids
    noise = gumbel(bits_at(seed, position, purpose, index))
    greedy = (temperature == 0)[:, None]
    column = torch.where(greedy, logits, logits + noise).argmax(dim=-1)
    return column if ids is None else ids[column]


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    slots = 4
    temperature = torch.arange(slots).float() % 3
    seed = torch.randint(-(2**62), 2**62, (slots,), generator=generator)
    for rows, size, scale in (
        (1, 1, 1.0),
        (3, 7, 1.0),
        (5, 1031, 0.0),
        (7, 6144, 3.0),
        (2, 4999, 12.0),
        (33, 2050, 1.0),
        (1, 151_936, 2.0),
    ):
        logits = torch.randn((rows, size), generator=generator) * scale
        if size > 100:
            logits[0, ::3] = -torch.inf
        if rows > 4:
            logits[1] = logits[1].round()  # ties
            logits[2] = -torch.inf
            logits[3] = -torch.inf
            logits[3, size - 1] = -900.0
            logits[4, 5::7] = torch.inf
        slot = (torch.arange(rows) + 1) % slots  # a row alone is drawn with noise
        example = {
            "logits": logits.to(device),
            "temperature": temperature.to(device),
            "seed": seed.to(device),
            "position": torch.randint(0, 4096, (rows,), generator=generator).to(device),
            "purpose": int(Purpose.TARGET),
            "slot": slot.to(device),
        }
        own = {"temperature": temperature[slot].to(device), "seed": seed[slot].to(device), "slot": None}
        ids = torch.randperm(3 * size, generator=generator)[:size].sort().values.to(device)
        yield example
        yield {**example, **own, "ids": ids}
        if size in (7, 6144):
            yield {**example, "temperature": None, "ids": ids}
            yield {**example, "temperature": None}


GUMBEL_ARGMAX = Op(
    name="gumbel_argmax",
    reference=gumbel_argmax_reference,
    examples=_examples,
    tolerance=0.0,
    why="tokens are compared, not numbers",
)
