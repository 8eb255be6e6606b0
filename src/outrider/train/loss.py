"""KL(target || draft) over many elements, a chunk at a time, so that logits of all of them never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.train.functional import Function, compiler, upcast

CHUNK_BYTES = 1 << 28
"""Maximum size of the logits of a chunk."""


def _chunk(
    hidden: Tensor,  # [m, H]
    weight: Tensor,  # [V, H]
    wanted: Tensor,  # [n, V] logits of the target
    row: Tensor,  # [m] int64
    scale: Tensor,  # [m]
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Divergence [m], agreement of the most likely tokens [m], and the gradients of sum(scale * divergence)."""
    logits, target = upcast(F.linear(hidden, weight)), upcast(wanted[row])
    log_q, log_p = logits.log_softmax(-1), target.log_softmax(-1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    agrees = logits.argmax(-1) == target.argmax(-1)
    if not with_gradient:
        return divergence, agrees, None, None
    gradient = ((log_q.exp() - p) * scale.unsqueeze(1)).to(hidden.dtype)
    return divergence, agrees, gradient @ weight, gradient.t() @ hidden


class _Divergence(torch.autograd.Function):
    """The gradients are taken with the loss, since both need the same logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        wanted: Tensor,
        row: Tensor,
        scale: Tensor,
        chunk: Function,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cast = weight.to(hidden.dtype)
        max_rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        size = -(-len(hidden) // -(-len(hidden) // max_rows))
        divergence, agrees, gradients = [], [], []
        weight_gradient = torch.zeros_like(weight) if with_gradient else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            kl, same, toward_hidden, toward_weight = chunk(
                hidden[part], cast, wanted, row[part], scale[part], with_gradient
            )
            divergence.append(kl)
            agrees.append(same)
            if weight_gradient is not None:
                gradients.append(toward_hidden)
                weight_gradient += toward_weight
        found = torch.cat(divergence)
        if weight_gradient is not None:
            ctx.save_for_backward(torch.cat(gradients), weight_gradient)
        agreeing = torch.cat(agrees)
        ctx.mark_non_differentiable(found, agreeing)
        return (found * scale).sum(), found, agreeing

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        toward_hidden, toward_weight = ctx.saved_tensors
        factor = outer[0]
        return toward_hidden * factor.to(toward_hidden.dtype), toward_weight * factor, None, None, None, None, None


class Divergence:
    """The loss of elements against rows of the target's logits."""

    def __init__(self, compiled: bool) -> None:
        """`compiled`: fuse what a chunk does."""
        self._chunk = compiler(compiled)(_chunk)

    def __call__(
        self,
        hidden: Tensor,  # [M, H] of the elements, normed
        weight: Tensor,  # [draft V, H] of the lm_head
        wanted: Tensor,  # [n, draft V] logits of the target
        row: Tensor,  # [M] int64, which of them an element is to match
        scale: Tensor,  # [M] weight of an element; 0: it carries no loss
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sum(scale * KL), and without gradients KL [M] and whether the most likely tokens agree [M]."""
        found: tuple[Tensor, Tensor, Tensor] = _Divergence.apply(  # type: ignore[no-untyped-call]
            hidden, weight, wanted, row, scale, self._chunk, torch.is_grad_enabled()
        )
        return found
