"""Where keys and values lie in memory. The only file of `cache` that knows tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values; a (block, head) pair is one contiguous [block_size, D] tile."""

    key: Tensor  # [num_blocks, Hkv, block_size, D]
    value: Tensor  # [num_blocks, Hkv, block_size, D]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The layers that share one set of blocks and one block table."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> list[LayerCache]:
        """One `LayerCache` a layer; untouched memory, since no key is read before it is written."""
        shape = (num_blocks, self.num_kv_heads, self.block_size, self.head_dim)

        def empty() -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=device)

        return [LayerCache(empty(), empty()) for _ in range(self.num_layers)]
