"""Where keys and values lie in memory. The only file of `cache` that knows tensors."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LARGE, _ADVICE = 1 << 21, 14  # bytes of a large page, and Linux's MADV_HUGEPAGE
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _ask_for_large_pages(memory: Tensor) -> None:
    """Blocks of a batch lie all over the cache: with pages of 4 KiB a CPU looks up another for each one it reads."""
    start, end = -(-memory.data_ptr() // _LARGE) * _LARGE, (memory.data_ptr() + memory.nbytes) // _LARGE * _LARGE
    if _LIBC is not None and memory.device.type == "cpu" and end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)  # refused: as it was


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
            memory = torch.empty(shape, dtype=self.dtype, device=device)
            _ask_for_large_pages(memory)
            return memory

        return [LayerCache(empty(), empty()) for _ in range(self.num_layers)]
