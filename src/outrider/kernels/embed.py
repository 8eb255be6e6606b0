"""Token embedding: ids [T] int64 and a matrix [V, H] in its stored type -> [T, H] of the type asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.op import Example, Op


def embed_reference(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.embedding(ids, weight).to(dtype)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, size in ((1, 64), (33, 67)):
            yield {
                "ids": torch.randint(31, (tokens,), generator=generator).to(device),
                "weight": torch.randn(31, size, generator=generator).to(device, stored),
                "dtype": torch.float32 if wide else stored,
            }


EMBED = Op("embed", embed_reference, ("cuda",), examples=_examples, tolerance=0.0, why="copies")
