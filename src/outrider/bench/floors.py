"""What a decode step cannot do without reading: the floor under its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from outrider.config import Resolved
from outrider.layers.parameter import Allocator


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
        memory = runner.memory
        shape = runner.model(
            runner.model_config, memory.max_model_len, Allocator.on(torch.device("meta"), runner.dtype)
        )
        drafter = runner.drafter.footprint(runner.draft_options, runner.target)
        return cls(
            target=sum(slot.nbytes_read for slot in shape.slots().values()),
            draft=drafter.weights_read,
            cache_per_token=(memory.bytes_per_block - drafter.per_block) // memory.block_size,
        )
