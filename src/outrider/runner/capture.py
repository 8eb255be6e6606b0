"""Which step programs the graph runner records: what a user may ask for, its default and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from outrider.errors import OptionError


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """The shapes of the programs to record, resolved. A runner that records nothing ignores them."""

    sizes: tuple[int, ...]  # rows, rising; the last is max_num_seqs
    num_drafts: tuple[int, ...]  # maximum drafts that a row verifies, rising; the last is K
    time_parts: bool = False  # whether the parts of a step are timed on the device

    @classmethod
    def resolve(
        cls,
        sizes: Sequence[int] | None,
        num_drafts: Sequence[int] | None,
        time_parts: bool,
        max_num_seqs: int,
        max_drafts: int,
    ) -> Self:
        """The options from what a user asked for; OptionError names what cannot be."""
        return cls(_sizes(sizes, max_num_seqs), _num_drafts(num_drafts, max_drafts), time_parts)


def _sizes(wanted: Sequence[int] | None, max_num_seqs: int) -> tuple[int, ...]:
    """What was asked for, or sizes of which each is at most half as large again as the one before it."""
    if wanted is None:
        sizes = {max_num_seqs}
        for power in range(max_num_seqs.bit_length()):
            sizes |= {size for size in (1 << power, 3 << power >> 1) if size < max_num_seqs}
        return tuple(sorted(sizes))
    sizes = {*wanted}
    if not sizes or min(sizes) < 1 or max(sizes) != max_num_seqs:
        raise OptionError(
            f"capture_sizes must be batch sizes from 1 that end at max_num_seqs {max_num_seqs}, or a step of more rows "
            f"would have no recorded program: {list(wanted)}; add {max_num_seqs} or change max_num_seqs"
        )
    return tuple(sorted(sizes))


def _num_drafts(wanted: Sequence[int] | None, max_drafts: int) -> tuple[int, ...]:
    """What was asked for, and K, without which a step that verifies all drafts would have no recorded program."""
    counts = {*(wanted or ()), max_drafts}
    if min(counts) < 0 or max(counts) > max_drafts:
        raise OptionError(
            f"capture_drafts must be numbers of drafts from 0 to num_speculative_tokens {max_drafts}: "
            f"{list(wanted or ())}"
        )
    return tuple(sorted(counts))
