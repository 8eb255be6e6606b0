"""The prompt steps that make every kernel of a device compile, from the sizes at which the kernels differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from outrider.kernels.gpu.attention import multiprocessors
from outrider.kernels.gpu.linear import FEW
from outrider.kernels.gpu.rope_attention import TALLEST


def shapes(
    device: torch.device,
    num_kv_heads: int,
    max_tokens: int,  # of a step
    max_length: int,  # of a prompt
    max_rows: int,  # of a step
) -> Iterable[tuple[int, ...]]:
    """The lengths of the prompts of each step to try: some alone, some together, and the largest step there is.

    Tiles grow by powers of two up to FEW tokens. Past that the products are cuBLAS's, and past TALLEST rows of a
    tile attention is the prompts' kernel, whatever the number of query heads a key head has.
    """
    tiles = [1 << power for power in range(FEW.bit_length())]
    sizes = [min(size, max_tokens) for size in (*tiles, FEW + FEW // 2, 4 * TALLEST, max_tokens)]
    steps = [[min(max_length, size - start) for start in range(0, size, max_length)] for size in sizes]
    # So many rows fill the multiprocessors: from half as many the keys of a row are shared out among fewer programs,
    # with one more they are not, and past twice as many short prompts have other kernels.
    full = multiprocessors(device) // num_kv_heads
    for num_rows in (full // 2, full + 1, 2 * full):
        steps += [[size] * num_rows for size in tiles if size <= max_length and size * num_rows <= max_tokens]
    return sorted({tuple(lengths[:max_rows]) for lengths in steps if lengths})
