"""What a scheduler is asked to be."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.errors import CapacityError, OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Sizes and limits, resolved. Checked when made: OptionError, or CapacityError if one sequence cannot fit.

    The pool must hold one sequence of `max_model_len`: then every request that is taken can run to
    its end, alone if it must, and none is cut short for want of memory.
    """

    max_model_len: int  # most tokens of a request, prompt and output
    num_blocks: int  # blocks of the key/value cache
    block_size: int = 16  # tokens a block
    max_num_seqs: int = 128  # slots: most requests running at once
    max_num_batched_tokens: int = 2048  # most query tokens of a step, drafts included
    max_prefill_tokens_beside_decodes: int = 2048  # of those, most that prompts get while others decode
    enable_prefix_caching: bool = True
    num_drafts: int = 0  # K: most drafts a row
    lookahead: int = 0  # positions past a row's last query token that the drafter may write: K if it keeps a cache
    rerun: int = 0  # tokens of a prefix hit to run again, to rebuild what a drafter keeps
    draft_cache: bool = False  # whether the drafter keeps keys and values of its own in the blocks
    depth: int = 1  # plans that may be in flight before the oldest is applied

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_prefill_tokens_beside_decodes", "block_size", "num_blocks", "depth"):
            self._at_least(name, 1)
        for name in ("num_drafts", "lookahead", "rerun"):
            self._at_least(name, 0)
        self._at_least("max_model_len", 2)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}, "
                "and each running request takes a token of every step: raise the one or lower the other"
            )
        fits = self.num_blocks * self.block_size
        if fits < self.max_model_len:
            raise CapacityError(
                f"the key/value cache holds {fits} tokens ({self.num_blocks} blocks of {self.block_size}) but "
                f"max_model_len is {self.max_model_len}: lower max_model_len to {fits} or give the cache more memory"
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} must be a whole number of {least} or more: {value!r}")
