"""A tile's keys in shares, one a program, and how what the programs leave is added up. See `gpu.rope_attention`."""

from __future__ import annotations

from torch import Tensor

from outrider.kernels.gpu.attention import find_row, weigh
from outrider.kernels.gpu.triton import begin, jit, jit_counts, launch, next_power_of_2, overlaps, round_to, tl, wait

# Partial results that a program of `add_up_behind` adds up at once, if there are few or many of them; its warps.
_FEW, _MANY, _WARPS = 16, 64, 2


def block_of_rows(num_rows: int) -> int:
    """As many rows as `find_row` looks at at once: of two sizes, so that few kernels are compiled."""
    return 32 if num_rows < 32 else max(256, next_power_of_2(num_rows + 1))


@jit
def share_out(num_keys, programs, BLOCK_N: tl.constexpr):
    """Steps of cached keys, and among how many of the programs they and the step of the query tokens are shared out."""
    steps = (num_keys + BLOCK_N - 1) // BLOCK_N
    share = (steps + programs) // programs
    return steps, (steps + share) // share


@jit
def add_up(
    partial,  # [SPLITS, T * Hq, D] float32
    log_weights,  # [SPLITS, T * Hq] float32
    out,
    query_row,  # [BLOCK_R] of a query head among all
    owned,  # [BLOCK_R]
    num_heads,  # T * Hq
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The result from `splits` partial ones, which other multiprocessors wrote: so not through this one's cache."""
    column = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split[None, :] * num_heads + query_row[:, None]
        known = owned[:, None] & (split < splits)[None, :]
        logs = tl.load(log_weights + at, mask=known, other=float("-inf"), cache_modifier=".cg")
        inside = known[:, :, None] & (column < HEAD_DIM)[None, None, :]
        value_at = partial + (at * HEAD_DIM)[:, :, None] + column[None, None, :]
        value = tl.load(value_at, mask=inside, other=0, cache_modifier=".cg")
        powers, decay, top, weight = weigh(logs, 1.0, top, weight, True)
        total = total * decay[:, None] + tl.sum(powers[:, :, None] * value, 1)
    result = total / tl.where(weight > 0, weight, 1.0)[:, None]
    inside = owned[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + query_row[:, None] * HEAD_DIM + column[None, :], round_to(result, out.dtype.element_ty), mask=inside)


@jit_counts("num_tokens", "num_rows", "splits")
def _add_up_kernel(
    partial,  # [SPLITS, T * Hq, D] float32
    log_weights,  # [SPLITS, T * Hq] float32
    out,  # [T * Hq, D]
    query_start,
    seq_lens,
    num_tokens,
    num_rows,
    num_heads,  # of a token
    splits,
    HEAD_DIM: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    query_row = tl.program_id(0) + tl.arange(0, 1)
    if not AHEAD:
        wait(PDL)
    token = tl.program_id(0) // num_heads
    row, start, end, length, _ = find_row(token, query_start, seq_lens, num_tokens, num_rows, 1, BLOCK_B)
    _, known = share_out(tl.where(row < num_rows, length - (end - start), 0), splits, BLOCK_N)
    if AHEAD:
        wait(PDL)
    count = num_tokens * num_heads
    if known <= FEW:
        add_up(partial, log_weights, out, query_row, query_row < count, count, known, HEAD_DIM, 1, FEW, BLOCK_D)
    else:
        add_up(partial, log_weights, out, query_row, query_row < count, count, known, HEAD_DIM, 1, MANY, BLOCK_D)


def add_up_behind(
    partial: Tensor,
    log_weights: Tensor,
    out: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    keys: int,
    ahead: bool,
) -> None:
    """out [T, Hq, D] from results [SPLITS, T, Hq, D] and their weights' logarithms, in a kernel of its own.

    Only programs that had work have left any: how many there were, of steps of `keys` keys, it finds out as they did.
    `ahead` as in `rope_attend`: whatever that may read before the kernel in front of it has ended, this may too.
    """
    splits, num_tokens, num_heads, head_dim = partial.shape
    num_rows, overlap = len(seq_lens), overlaps(out)
    _add_up_kernel[(num_tokens * num_heads,)](
        partial,
        log_weights,
        out,
        query_start,
        seq_lens,
        num_tokens,
        num_rows,
        num_heads,
        splits,
        HEAD_DIM=head_dim,
        AHEAD=ahead and overlap,
        BLOCK_N=keys,
        FEW=_FEW,
        MANY=_MANY,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_B=block_of_rows(num_rows),
        PDL=overlap,
        num_warps=_WARPS,
        **launch(overlap),
    )
