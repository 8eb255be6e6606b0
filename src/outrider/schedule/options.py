"""What a scheduler is asked to be."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.core.sizes import Sizes, check_whole
from outrider.errors import CapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Sizes and limits, resolved. Checked when made: OptionError, or CapacityError if one sequence cannot fit.

    The pool must hold one sequence of `max_model_len`. Then every request that is taken can run to its end, alone if
    it must, and none is cut short for lack of memory.
    """

    sizes: Sizes
    num_blocks: int  # blocks of the key/value cache
    max_prefill_tokens_beside_decodes: int = 2048  # most tokens that prompts get in a step in which others decode
    enable_prefix_caching: bool = True
    lookahead: int = 0  # positions past a row's last query token that the drafter may write: K if it keeps a cache
    rerun: int = 0  # tokens of a prefix hit to run again, to rebuild what a drafter keeps
    draft_cache: bool = False  # whether the drafter keeps keys and values of its own in the blocks
    draft_limit: int | None = None  # the length of a sequence past which no draft goes; None: max_model_len
    depth: int = 1  # plans that may be in flight before the oldest is applied

    def __post_init__(self) -> None:
        for name in ("max_prefill_tokens_beside_decodes", "num_blocks", "depth"):
            check_whole(name, getattr(self, name), 1)
        for name in ("lookahead", "rerun"):
            check_whole(name, getattr(self, name), 0)
        max_model_len, block_size = self.sizes.max_model_len, self.sizes.block_size
        fits = self.num_blocks * block_size
        if fits < max_model_len:
            raise CapacityError(
                f"the key/value cache holds {fits} tokens ({self.num_blocks} blocks of {block_size}) but "
                f"max_model_len is {max_model_len}: lower max_model_len to {fits} or give the cache more memory"
            )
