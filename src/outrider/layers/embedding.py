"""Token embedding, and the head that reads logits; the two may be one matrix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.linear import LINEAR
from outrider.layers.parameter import Allocator, Weights


class Embedding:
    """Token ids to vectors."""

    def __init__(self, vocab_size: int, hidden_size: int, allocator: Allocator) -> None:
        self.weight = allocator.parameter(vocab_size, hidden_size)
        self._dtype = allocator.activation_dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H] in the activations' dtype."""
        return F.embedding(ids, self.weight).to(self._dtype)

    def weights(self, prefix: str) -> Weights:
        return {f"{prefix}weight": self.weight}


class Head:
    """Vectors to logits, with a matrix of its own or the embedding's."""

    def __init__(self, vocab_size: int, hidden_size: int, allocator: Allocator, tied: Embedding | None) -> None:
        self._tied = tied is not None
        self.weight = allocator.parameter(vocab_size, hidden_size) if tied is None else tied.weight
        self._linear = LINEAR.on(allocator.device)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[L, H] -> [L, V] float32."""
        logits: Tensor = self._linear(hidden, self.weight, wide=True)
        return logits

    def weights(self, prefix: str) -> Weights:
        """Nothing when tied: the embedding owns the matrix."""
        return {} if self._tied else {f"{prefix}weight": self.weight}
