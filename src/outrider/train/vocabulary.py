"""The draft vocabulary: the tokens a head can draft, and their ids in the target's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.errors import OptionError
from outrider.train.data import Documents


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Token ids of the target, ascending; draft token j stands for tokens[j]."""

    tokens: Tensor  # [draft V] int64
    vocab_size: int  # the target's

    @classmethod
    def by_frequency(
        cls,
        documents: Documents,
        vocab_size: int,
        size: int | None,  # None: all of the target's
        always: Iterable[int],  # special tokens, in it if they appear at all
    ) -> DraftVocabulary:
        """The most frequent tokens of the documents, of equally frequent ones the lower ids."""
        if size is None or size == vocab_size:
            return cls(torch.arange(vocab_size), vocab_size)
        if size > vocab_size:
            raise OptionError(f"draft_vocab_size {size} is more than the target's vocabulary: at most {vocab_size}")
        counts = np.bincount(documents.tokens, minlength=vocab_size)
        special = np.array(sorted({token for token in always if counts[token]}), dtype=np.int64)
        if len(special) > size:
            raise OptionError(f"draft_vocab_size {size} cannot hold the {len(special)} special tokens of the data")
        counts[special] = counts.max() + 1
        order = np.lexsort((np.arange(vocab_size), -counts))[:size]
        return cls(torch.from_numpy(np.sort(order)), vocab_size)

    @property
    def is_full(self) -> bool:
        """Whether every token of the target can be drafted."""
        return len(self.tokens) == self.vocab_size

    @property
    def offset(self) -> Tensor:
        """[draft V] int64, the checkpoint's `d2t`: target = draft + offset[draft]."""
        return self.tokens - torch.arange(len(self.tokens))

    @property
    def contains(self) -> Tensor:
        """[V] bool, the checkpoint's `t2d`."""
        found = torch.zeros(self.vocab_size, dtype=torch.bool)
        found[self.tokens] = True
        return found
