"""P-EAGLE from scratch: one pass over the context rows, the bonus row and K - 1 mask rows (arXiv 2602.01469).

A mask row holds the mask token, and for features `mask_hidden`, which pass the same norms and projection as any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.eagle3 import Head, Round


def mask_token(head: Head) -> int:
    """The token that stands for one not yet known, wherever the config says it."""
    named = head.config.get("dflash_config") or {}
    keys = ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")
    said = [named.get("mask_token_id"), *(head.config.get(key) for key in keys)]
    return next(token for token in said if token is not None)


def draft(head: Head, tokens: list[int], features: Tensor, num_drafts: int, drawn: list[int] | None = None) -> Round:
    """tokens: the n + 1 committed, the target's newest last; features [n, 3 H] of all but that one.

    drawn: as EAGLE-3 has it; no row here depends on a draft.
    """
    num_masks = num_drafts - 1
    masks = head["mask_hidden"].view(1, -1).expand(num_masks, -1)
    ids = tokens[1:] + [mask_token(head)] * num_masks
    hidden = head.project(torch.cat((features, masks)))
    logits = head(ids, hidden)[0][-num_drafts:]
    return Round(ids, hidden, logits, [head.token(int(row.argmax())) for row in logits])
