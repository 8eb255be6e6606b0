"""Where the memory goes: weights, working space, and as many key/value blocks as the rest holds."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import torch

from outrider.errors import CapacityError
from outrider.layers.parameter import Allocator, activation_dtype
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder

MIB = 1 << 20
HOST_SHARE = 0.25
"""Largest share of a host's free memory that the cache takes unasked: the host runs other programs too."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, by purpose. `num_blocks` is what the scheduler may hand out."""

    weights: int
    workspace: int  # most that a step's activations and logits take
    cache: int
    bytes_per_block: int
    num_blocks: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit at once."""
        return self.num_blocks * self.block_size

    def to_dict(self) -> dict[str, int]:
        """As `explain --json` prints it."""
        return asdict(self) | {"num_tokens": self.num_tokens}


def plan_memory(
    model: type[Decoder],
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_drafts: int,
    cache_bytes: int | None,  # None: what the device has left, no more than all sequences could fill
    utilization: float,  # share of a GPU's free memory to use
) -> MemoryPlan:
    """Sizes the cache before anything is loaded. CapacityError if one full sequence does not fit."""
    activation = activation_dtype(device, dtype)
    shape = model(config, max_model_len, Allocator(torch.device("meta"), dtype, activation))
    weights = sum(weight.nbytes for weight in shape.weights().values())
    # widest live tensors of a layer: residual, its norm, qkv or gate_up, and what comes of it
    width = 4 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_heads * config.head_dim
    logits_rows = max_num_seqs * (num_drafts + 1)
    workspace = max_num_batched_tokens * width * activation.itemsize + 3 * logits_rows * config.vocab_size * 4
    per_block = shape.cache_layout(block_size).bytes_per_block
    blocks_per_seq = -(-max_model_len // block_size)
    if cache_bytes is None:
        room = free_memory(device) * (utilization if device.type == "cuda" else HOST_SHARE) - weights - workspace
        cache_bytes = min(int(room), per_block * blocks_per_seq * max_num_seqs)
    num_blocks = max(cache_bytes, 0) // per_block
    if num_blocks < blocks_per_seq:
        raise CapacityError(
            f"one sequence of max_model_len {max_model_len} needs {blocks_per_seq * per_block / MIB:.1f} MiB of "
            f"key/value cache, there is room for {max(cache_bytes, 0) / MIB:.1f} MiB: "
            "lower max_model_len or raise kv_cache_memory"
        )
    return MemoryPlan(weights, workspace, num_blocks * per_block, per_block, num_blocks, block_size)


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
