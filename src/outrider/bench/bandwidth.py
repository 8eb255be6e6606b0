"""How fast this machine reads memory: the floor under every decode step at batch 1."""

from __future__ import annotations

import time

import torch

SIZE = 256 << 20
"""Bytes read at a time: more than any cache holds."""


def read_bandwidth(device: torch.device, repeats: int = 8) -> float:
    """Bytes a second of the best of some reductions over a large tensor, all of torch's threads reading."""
    data = torch.ones(SIZE // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return SIZE / best
