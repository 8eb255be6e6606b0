"""Documents packed into rows of one length, in an order that (seed, epoch) decides.

A document longer than a row is cut; a piece that fits is never split. Pieces go, in random order, to the row
among the last few that they fill best, so that few places stay empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.train.data import Documents

OPEN_ROWS = 64
"""Rows that are being filled at once."""

EMPTY = 1 << 30
"""The document of a place in a row that holds none; more than any real one, so that documents ascend in a row."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows on the device, side by side. Every field is [B, L] int64."""

    tokens: Tensor
    document: Tensor  # number of the document within its row, EMPTY where there is none
    position: Tensor  # within the document
    remaining: Tensor  # tokens of the document that follow
    untrained: Tensor  # of those, how many belong to a prompt, whose tokens are not trained

    @classmethod
    def of(cls, rows: NDArray[np.int32], device: torch.device) -> Batch:
        """From what `Packing.rows` gives; the copy to a GPU does not wait."""
        table = torch.from_numpy(rows)
        if device.type == "cuda":
            table = table.pin_memory()
        return cls(*table.to(device, non_blocking=True).long().unbind(0))


@dataclass(frozen=True, slots=True)
class Packing:
    """One epoch's rows. Pieces of documents are sorted by the row that holds them."""

    tokens: NDArray[np.int32]  # all documents
    max_length: int
    row_start: NDArray[np.int64]  # [R + 1], the first piece of each row
    source: NDArray[np.int64]  # [P], where a piece's tokens start in `tokens`
    length: NDArray[np.int64]  # [P]
    prompt: NDArray[np.int64]  # [P], leading tokens of the piece that belong to a prompt
    offset: NDArray[np.int64]  # [P], where it starts in its row

    def __len__(self) -> int:
        return len(self.row_start) - 1

    def rows(self, first: int, last: int) -> NDArray[np.int32]:
        """[5, last - first, L]: the fields of `Batch` for some rows."""
        low, high = self.row_start[first], self.row_start[last]
        length, count = self.length[low:high], last - first
        row = np.repeat(np.arange(count), np.diff(self.row_start[first : last + 1]))
        inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        index = np.repeat(row * self.max_length + self.offset[low:high], length) + inside
        found = np.zeros((5, count * self.max_length), dtype=np.int32)
        found[1] = EMPTY
        found[0, index] = self.tokens[np.repeat(self.source[low:high], length) + inside]
        number = np.arange(high - low) - np.repeat(
            self.row_start[first:last] - low, np.diff(self.row_start[first : last + 1])
        )
        found[1, index] = np.repeat(number, length)
        found[2, index] = inside
        found[3, index] = np.repeat(length - 1, length) - inside
        found[4, index] = np.maximum(np.repeat(self.prompt[low:high] - 1, length) - inside, 0)
        return found.reshape(5, count, self.max_length)


def pack(documents: Documents, max_length: int, seed: int, epoch: int) -> Packing:
    """The rows of one epoch: the same for the same arguments, whatever was asked before."""
    pieces = -(-documents.length // max_length)
    document = np.repeat(np.arange(len(documents)), pieces)
    cut = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
    length = np.minimum(documents.length[document] - cut, max_length)
    order = np.random.default_rng((seed, epoch)).permutation(len(document))
    row, offset = _fit(length[order], max_length)
    by_row = np.lexsort((offset, row))
    order, row, offset = order[by_row], row[by_row], offset[by_row]
    return Packing(
        tokens=documents.tokens,
        max_length=max_length,
        row_start=np.searchsorted(row, np.arange(row[-1] + 2)).astype(np.int64),
        source=documents.start[document[order]] + cut[order],
        length=length[order],
        prompt=np.clip(documents.prompt_length[document[order]] - cut[order], 0, length[order]),
        offset=offset,
    )


def _fit(lengths: NDArray[np.int64], max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row and the offset of every piece: the fullest open row that has room, else a new one for the fullest."""
    row, offset = np.empty_like(lengths), np.empty_like(lengths)
    space = np.full(OPEN_ROWS, max_length, dtype=np.int64)  # left in each open row
    number = np.arange(OPEN_ROWS)
    opened = OPEN_ROWS
    for index, length in enumerate(lengths.tolist()):
        left = space - length
        best = int(np.where(left < 0, max_length + 1, left).argmin())
        if left[best] < 0:
            best = int(space.argmin())
            space[best], number[best] = max_length, opened
            opened += 1
        row[index], offset[index] = number[best], max_length - space[best]
        space[best] -= length
    return np.unique(row, return_inverse=True)[1], offset


class Stream:
    """Endless rows: epoch after epoch, from a place that can be saved and found again."""

    def __init__(self, documents: Documents, max_length: int, seed: int, epoch: int = 0, row: int = 0) -> None:
        self._documents, self._max_length, self._seed = documents, max_length, seed
        self.epoch, self.row = epoch, row
        self._packing = pack(documents, max_length, seed, epoch)

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.row / len(self._packing)

    def take(self, count: int) -> NDArray[np.int32]:
        """[5, count, L]: the next rows, beyond the end of an epoch those of the next."""
        parts = []
        while count:
            if self.row == len(self._packing):
                self.epoch, self.row = self.epoch + 1, 0
                self._packing = pack(self._documents, self._max_length, self._seed, self.epoch)
            taken = min(count, len(self._packing) - self.row)
            parts.append(self._packing.rows(self.row, self.row + taken))
            self.row, count = self.row + taken, count - taken
        return np.concatenate(parts, axis=1)
