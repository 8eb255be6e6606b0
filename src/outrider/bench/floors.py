"""What a decode step cannot do without reading: the floor under its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from outrider.config import Resolved


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes a decode step reads from memory, however many sequences it serves."""

    target: int  # weights: all, but an embedding that is not the head as well
    draft: int  # weights of the draft head, in as many passes as it makes; 0 without one
    cache_per_token: int  # the target's keys and values of one token of one sequence

    @classmethod
    def of(cls, resolved: Resolved) -> Self:
        """Of a resolved configuration."""
        runner = resolved.runner
        config, memory = runner.model_config, runner.memory
        drafter = runner.drafter.footprint(runner.draft_options, runner.target)
        embedding = config.vocab_size * config.hidden_size * runner.dtype.itemsize
        return cls(
            target=memory.weights - drafter.weights - (0 if config.tie_word_embeddings else embedding),
            draft=drafter.weights_read,
            cache_per_token=(memory.bytes_per_block - drafter.per_block) // memory.block_size,
        )
