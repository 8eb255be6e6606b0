"""Where the memory goes: weights, working space, recorded programs, and as many key/value blocks as the rest holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from outrider.core.sizes import MIB
from outrider.device import free_memory
from outrider.draft.base import Footprint, TargetFacts
from outrider.errors import CapacityError
from outrider.layers.parameter import Allocator, activation_dtype
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder
from outrider.runner.processor_tables import table_bytes
from outrider.verify.base import LogitsProcessor

HOST_SHARE = 0.5
"""Share of what a host has left beside the weights that the cache takes unasked: the host runs other programs too."""

SHORTEST = 256
"""A `max_model_len` that nobody asked for is lowered to fit the memory, but not under this."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a configuration asks of the memory."""

    model: type[Decoder]
    config: ModelConfig
    target: TargetFacts
    may_shorten: bool  # whether max_model_len was left to us
    keeps_draft_logits: bool
    weighs_probabilities: bool  # whether the verifier compares distributions, and not tokens
    drafter: Footprint
    processors: tuple[LogitsProcessor, ...]
    programs: int  # bytes that the runner itself will hold
    inplace: bool  # whether kernels change logits where they stand; torch's make copies
    cache_bytes: int | None  # None: what the device has left, no more than all sequences could fill
    utilization: float  # share of a GPU's free memory to use


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, by purpose. `num_blocks` is what the scheduler may hand out."""

    weights: int  # the target's and the drafter's, as are all that follow
    workspace: int  # most that a step's activations and logits take, and the tables of all slots
    programs: int  # what the runner keeps of recorded steps
    cache: int
    bytes_per_block: int
    num_blocks: int
    block_size: int
    max_model_len: int  # as asked, or lowered to what fits

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit at once."""
        return self.num_blocks * self.block_size

    def to_dict(self) -> dict[str, int]:
        """As `explain --json` prints it."""
        return asdict(self) | {"num_tokens": self.num_tokens}


def plan_memory(demand: Demand) -> MemoryPlan:
    """Sizes the cache before anything is loaded. CapacityError if one full sequence does not fit."""
    target, sizes = demand.target, demand.target.sizes
    activation = activation_dtype(target.device, target.dtype)
    meta = Allocator(torch.device("meta"), target.dtype, activation)
    shape = demand.model(demand.config, sizes.max_model_len, meta)
    weights = sum(slot.nbytes for slot in shape.slots().values()) + demand.drafter.weights
    workspace = _workspace(demand, activation) + demand.drafter.workspace
    per_block = shape.cache_layout(sizes.block_size).bytes_per_block + demand.drafter.per_block
    taken = weights + workspace + demand.programs
    free = free_memory(target.device)
    left = max(int(_usable(demand, free - taken)), 0)
    if demand.cache_bytes is None:
        room = min(left, per_block * sizes.max_blocks * sizes.max_num_seqs)
    else:
        room = demand.cache_bytes
        if room > free - taken:
            raise CapacityError(
                f"kv_cache_memory asks for {room / MIB:.1f} MiB; beside weights, workspace and recorded programs "
                f"{max(free - taken, 0) / MIB:.1f} MiB are free: lower it"
            )
    num_blocks = room // per_block
    max_model_len = sizes.max_model_len
    fits = num_blocks * sizes.block_size
    if fits < max_model_len and demand.may_shorten and fits >= SHORTEST:
        max_model_len = fits
    if fits < max_model_len:
        needed = f"one sequence of max_model_len {max_model_len} needs {sizes.max_blocks * per_block / MIB:.1f} MiB of"
        found = f"key/value cache, there is room for {room / MIB:.1f} MiB, or {fits} tokens"
        if demand.cache_bytes is not None:
            raise CapacityError(f"{needed} {found}: lower max_model_len or raise kv_cache_memory")
        raise CapacityError(
            f"{needed} {found}, of {free / MIB:.1f} MiB free on {target.device}: weights take {weights / MIB:.1f}, a "
            f"step's workspace {workspace / MIB:.1f}, recorded programs {demand.programs / MIB:.1f}; lower "
            "max_model_len, max_num_seqs or max_num_batched_tokens, or free memory there"
        )
    return MemoryPlan(
        weights=weights,
        workspace=workspace,
        programs=demand.programs,
        cache=num_blocks * per_block,
        bytes_per_block=per_block,
        num_blocks=num_blocks,
        block_size=sizes.block_size,
        max_model_len=max_model_len,
    )


def _workspace(demand: Demand, activation: torch.dtype) -> int:
    config, sizes = demand.config, demand.target.sizes
    slots = sizes.max_num_seqs
    # widest live tensors of a layer: residual, its norm, qkv or gate_up, and what comes of it
    width = 4 * config.hidden_size + 3 * max(config.intermediate_size, config.num_heads * config.head_dim)
    activations = sizes.max_num_batched_tokens * width * activation.itemsize
    # logits; where nothing is in place, what processors make of them and noise too; probabilities of both models
    copies = (1 if demand.inplace else 3) + (5 if demand.weighs_probabilities else 0)
    copies += sum(processor.num_copies for processor in demand.processors)
    logits = copies * min(slots * (sizes.num_drafts + 1), sizes.max_num_batched_tokens) * config.vocab_size * 4
    history = slots * sizes.max_model_len * 8
    draft_logits = slots * sizes.num_drafts * config.vocab_size * 4 if demand.keeps_draft_logits else 0
    tables = [table for processor in demand.processors for table in processor.tables]
    state = table_bytes(tables, slots + 1, config.vocab_size)
    rope = sizes.max_model_len * config.head_dim * 4
    return activations + logits + history + draft_logits + state + rope


def _usable(demand: Demand, left: int) -> float:
    return left * (demand.utilization if demand.target.device.type == "cuda" else HOST_SHARE)
