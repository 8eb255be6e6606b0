"""The sizes of an engine: what drafters, the memory plan, runners and the scheduler all have to agree on."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.core.reading import written_short
from outrider.errors import OptionError

MIB = 1 << 20
"""Bytes of a mebibyte."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes and limits, resolved. Checked when made: OptionError names what cannot be."""

    max_model_len: int  # most tokens of a request, prompt and output
    max_num_seqs: int = 128  # slots: most requests running at once
    max_num_batched_tokens: int = 2048  # most query tokens of a step, drafts included
    block_size: int = 16  # tokens that a key/value block holds
    num_drafts: int = 0  # K: most drafts a row

    def __post_init__(self) -> None:
        for name, lowest in (("max_model_len", 2), ("max_num_seqs", 1), ("block_size", 1), ("num_drafts", 0)):
            check_whole(name, getattr(self, name), lowest)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}, "
                "and each running request takes a token of every step: raise the one or lower the other"
            )

    @property
    def max_blocks(self) -> int:
        """Blocks that the longest request takes."""
        return -(-self.max_model_len // self.block_size)


def check_whole(name: str, value: object, lowest: int, highest: int | None = None) -> None:
    """OptionError unless the value is a whole number within bounds. Left out, `highest` is what 63 bits hold."""
    bounds = f"of {lowest} or more" if highest is None else f"from {lowest} to {highest}"
    beyond = highest is not None and isinstance(value, int) and value > highest
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest or beyond:
        raise OptionError(f"{name} must be a whole number {bounds}: {written_short(value)}")
    if value >= 2**63:
        raise OptionError(f"{name} is too large: {written_short(value)}; give less than 2**63")
