"""From the target's choice at every logits row to what each row of the step gains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op


def accept_drafts_reference(
    choice: Tensor,  # [L] int64, the target's token at each logits row if no draft stands there
    stands: Tensor | None,  # [L] bool, whether the draft there stands; None: iff it equals the choice
    logits_start: Tensor,  # [B+1] int32
    draft_tokens: Tensor,  # [B, K] int64
) -> tuple[Tensor, Tensor]:
    """tokens [B, K+1] int64 and count [B] int32 of a `Verdict`.

    A row that owns n + 1 logits rows has n drafts, n <= K. It gains the drafts before the first that
    does not stand, then the choice there; -1 follows. A row that owns none gains nothing.
    """
    width = draft_tokens.shape[1]
    column = torch.arange(width + 1, device=choice.device)
    num_drafts = logits_start.diff()[:, None] - 1
    index = (logits_start[:-1, None] + column).clamp(max=choice.shape[0])
    own = torch.nn.functional.pad(choice, (0, 1), value=-1)[index]
    padded = None if stands is None else torch.nn.functional.pad(stands, (0, 1))
    stand = own[:, :-1] == draft_tokens if padded is None else padded[index[:, :-1]]
    accepted = (stand & (column[:-1] < num_drafts)).cumprod(dim=1).sum(dim=1, keepdim=True)
    count = torch.where(num_drafts >= 0, accepted + 1, 0)
    drafts = torch.nn.functional.pad(draft_tokens, (0, 1))
    tokens = torch.where(column < accepted, drafts, own)
    return torch.where(column < count, tokens, -1), count[:, 0].int()


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for width, owned, padding in (
        (0, [1], 0),
        (3, [4], 0),
        (3, [0, 0], 0),
        (3, [0, 0], 2),
        (5, [1, 0, 6, 4, 2, 6, 3], 3),
        (32, [33, 1, 20], 0),
        (1, torch.randint(0, 3, (33,), generator=generator).tolist(), 1),
        (7, torch.randint(0, 9, (128,), generator=generator).tolist(), 0),
    ):
        logits_start = torch.tensor([0, *owned]).cumsum(0).int()
        choice = torch.randint(0, 2, (sum(owned) + padding,), generator=generator)
        drafts = torch.randint(0, 2, (len(owned), width), generator=generator)
        stands = torch.randint(0, 2, (sum(owned) + padding,), generator=generator).bool()
        for test in (None, stands.to(device)):
            yield {
                "choice": choice.to(device),
                "stands": test,
                "logits_start": logits_start.to(device),
                "draft_tokens": drafts.to(device),
            }


ACCEPT_DRAFTS = Op(
    name="accept_drafts",
    reference=accept_drafts_reference,
    examples=_examples,
    tolerance=0.0,
    why="tokens",
)
