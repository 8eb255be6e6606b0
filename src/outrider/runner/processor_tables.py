"""The device tables of one logits processor: a row for every slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.core.plan import Admission
from outrider.runner.processor_guard import GuardedProcessor
from outrider.verify.base import ActiveProcessor, LogitsProcessor, Table, Value

NUMPY: Mapping[torch.dtype, np.dtype[Any]] = {
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float32: np.dtype(np.float32),
}
"""The types that a table may have, and numpy's name of each."""


class ProcessorTables:
    """A processor and its tables.

    A table that `commit` leaves alone holds `fill` in the rows of requests that do not want the processor.
    """

    def __init__(self, processor: LogitsProcessor, num_slots: int, vocab_size: int, device: torch.device) -> None:
        state = {
            table.name: torch.full(table.shape(num_slots, vocab_size), table.fill, dtype=table.dtype, device=device)
            for table in processor.tables
        }
        self.processor = processor
        self.active = ActiveProcessor(processor, state)
        self._written: set[int] = set()  # slots whose rows may hold more than `fill`
        self._emptied: set[int] = set()  # of those, the ones that `write` empties next
        self._admitted: set[int] = set()  # slots that the processor was asked to admit, for `release`

    def columns(self, admissions: Sequence[Admission], wanting: Sequence[Admission]) -> dict[str, NDArray[Any]]:
        """What `write` needs on the device for requests that take slots, of which `wanting` want the processor.

        Empty where no row changes.
        """
        taken = {one.slot for one in wanting}
        emptied = [one.slot for one in admissions if one.slot in self._written and one.slot not in taken]
        self._emptied = set(emptied)
        self._written |= taken
        found: dict[str, NDArray[Any]] = {}
        if emptied:
            found[self._key("emptied")] = np.array(emptied, np.int64)
        if wanting:
            found[self._key("slot")] = np.array([one.slot for one in wanting], np.int64)
            values = [self._admit(one) for one in wanting]
            for table in self.processor.tables:
                shape = self.active.state[table.name].shape[1:]
                column = np.full((len(wanting), *shape), table.fill, NUMPY[table.dtype])
                for row, given in enumerate(values):
                    try:
                        if table.name in given:
                            _fill(column, row, given[table.name])
                    except Exception as error:
                        if not isinstance(self.processor, GuardedProcessor):
                            raise
                        # The guard's own table is the last, so it takes this in.
                        column[row], values[row] = table.fill, self.processor.not_admitted(error)
                found[self._key("table", table.name)] = column
        return found

    def write(self, sent: Mapping[str, Tensor]) -> None:
        """Writes the columns, which have been sent to the device."""
        slot, emptied = sent.get(self._key("slot")), sent.get(self._key("emptied"))
        for table in self.processor.tables:
            rows = self.active.state[table.name]
            if slot is not None:
                rows.index_copy_(0, slot, sent[self._key("table", table.name)])
            if emptied is not None:
                rows.index_fill_(0, emptied, table.fill)
        self._written -= self._emptied

    def release(self, slot: int) -> None:
        """Notifies the processor, if it was asked to admit the slot's request: that may have been interrupted."""
        if slot in self._admitted:
            self._admitted.discard(slot)
            self.processor.release(slot)

    def _admit(self, admission: Admission) -> Mapping[str, Value]:
        self._admitted.add(admission.slot)
        return self.processor.admit(admission)

    def _key(self, *what: str) -> str:
        return ".".join((self.processor.name, *what))


def table_bytes(tables: Sequence[Table], num_slots: int, vocab_size: int) -> int:
    """What tables take on the device."""
    return sum(int(np.prod(table.shape(num_slots, vocab_size))) * table.dtype.itemsize for table in tables)


def _fill(column: NDArray[Any], row: int, value: Value) -> None:
    """Writes what a processor gave into a row. Whole numbers past the type's largest are the largest."""
    if isinstance(value, Mapping):
        if value:
            column[row, list(value.keys())] = list(value.values())
    elif column.dtype.kind == "i":
        column[row] = np.minimum(value, np.iinfo(column.dtype).max)
    else:
        column[row] = value
