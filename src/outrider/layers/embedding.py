"""Token embedding, and the head that reads logits; the two may be one matrix."""

from __future__ import annotations

from torch import Tensor

from outrider.kernels.embed import EMBED
from outrider.layers.parameter import Allocator
from outrider.layers.weight import Dense, TensorSlot, WeightSlots


class Embedding:
    """Token ids to vectors."""

    def __init__(self, vocab_size: int, hidden_size: int, allocator: Allocator, is_head: bool = False) -> None:
        """`is_head`: a step reads all of the matrix, since logits are read off it too."""
        self.weight = Dense(allocator.parameter(vocab_size, hidden_size))
        self._is_head = is_head
        self._dtype = allocator.activation_dtype
        self._embed = EMBED.on(allocator.device)

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H] in the activations' dtype."""
        return self._embed(ids, self.weight.tensor, self._dtype)

    def slots(self, prefix: str) -> WeightSlots:
        return {f"{prefix}weight": TensorSlot(self.weight.tensor, is_read=self._is_head)}


class Head:
    """Vectors to logits, with a matrix of its own or the embedding's."""

    def __init__(self, vocab_size: int, hidden_size: int, allocator: Allocator, tied: Embedding | None) -> None:
        self._tied = tied is not None
        self.weight = allocator.weight([vocab_size], hidden_size) if tied is None else tied.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """[L, H] -> [L, V] float32."""
        return self.weight.multiply(hidden, upcast=True)

    def slots(self, prefix: str) -> WeightSlots:
        """Nothing when tied: the embedding owns the matrix."""
        own = {} if self._tied else self.weight.slots(0, self.weight.shape[0])
        return {f"{prefix}{what}": slot for what, slot in own.items()}
