"""The results of a step as columns with names: how the device packs them, and the one parser for every runner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from outrider.core.plan import StepResult
from outrider.kernels.report import REPORT
from outrider.runner.step import StepOutput
from outrider.tensors import Column

TOKENS, COUNT, INVALID, WAITING = "tokens", "count", "invalid", "waiting"


class ResultLayout:
    """Where each column of a step's results lies in a table of int64 cells; built once per runner.

    Every step reports the tokens of a row, how many of them it gained, whether the last of those is none, and how many
    drafts now wait to be verified.
    `declared` are further columns of the verifier and the logits processors, with values for each token.
    """

    def __init__(self, num_drafts: int, declared: Iterable[Column], device: torch.device) -> None:
        self._num_tokens = num_drafts + 1
        declared = tuple(declared)
        self._declared = {column.name: column for column in declared}
        every = (
            Column(TOKENS, self._num_tokens, torch.int64),
            Column(COUNT, 1, torch.int32),
            Column(INVALID, 1, torch.int32),
            Column(WAITING, 1, torch.int32),
            *(column._replace(width=self._num_tokens * column.width) for column in declared),
        )
        self._cells: dict[str, slice] = {}
        self._width = 0
        for column in every:
            assert column.name not in self._cells, f"two parts report a column named {column.name}"
            self._cells[column.name] = slice(self._width, self._width + column.width)
            self._width += column.width
        self._width_of_all_steps = self._cells[WAITING].stop
        self._report = REPORT.on(device)

    def table(self, num_rows: int, device: torch.device) -> Tensor:
        """[B, W] int64 on the device, to `pack` into. Columns of parts that do not run stay zero."""
        make = torch.zeros if self._declared else torch.empty
        return make(num_rows, self._width, dtype=torch.int64, device=device)

    def pack(self, output: StepOutput, table: Tensor) -> None:
        """Writes a step's output into the table, so that the host needs one copy for all of it."""
        verdict, waiting = output.verdict, None if output.draft is None else output.draft.length
        cells = table[:, : self._width_of_all_steps]
        self._report(verdict.tokens, verdict.count, verdict.invalid, waiting, cells)
        for name, values in output.values.items():
            cells = table[:, self._cells[name]]
            bits = values.view(torch.int32) if values.dtype == torch.float32 else values
            cells.copy_(bits.reshape(cells.shape))

    def unpack(self, table: Tensor) -> dict[str, Tensor]:
        """The columns of a table that the host has fetched."""
        columns = {name: table[:, cells] for name, cells in self._cells.items()}
        for name in (COUNT, INVALID, WAITING):
            columns[name] = columns[name][:, 0]
        for name, column in self._declared.items():
            values = columns[name].to(torch.int32 if column.dtype == torch.float32 else column.dtype)
            columns[name] = values.view(column.dtype).view(len(table), self._num_tokens, column.width)
        return columns

    @staticmethod
    def columns(output: StepOutput) -> dict[str, Tensor]:
        """The columns of an output that needs no packing, since the host reads it at once."""
        verdict = output.verdict
        columns = {TOKENS: verdict.tokens, COUNT: verdict.count, INVALID: verdict.invalid, **output.values}
        if output.draft is not None:
            columns[WAITING] = output.draft.length
        return columns

    def read(self, step: int, columns: Mapping[str, Tensor]) -> StepResult:
        """The result of a step from its columns; a column left out was not reported."""
        counts = columns[COUNT].tolist()
        tokens = tuple(tuple(row[:count]) for row, count in zip(columns[TOKENS].tolist(), counts, strict=True))
        waiting = tuple(columns[WAITING].tolist()) if WAITING in columns else (0,) * len(tokens)
        flags = columns[INVALID].tolist()
        invalid = tuple(row for row, flag in enumerate(flags) if flag) if any(flags) else ()
        if not self._declared:
            return StepResult(step, tokens, waiting, invalid)
        values = {name: _by_token(columns[name], counts) for name in self._declared if name in columns}
        return StepResult(step, tokens, waiting, invalid, values)


def _by_token(values: Tensor, counts: Sequence[int]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """[B, K+1, width] as the values of each token that a row gained."""
    rows = values.tolist()
    return tuple(tuple(map(tuple, row[:count])) for row, count in zip(rows, counts, strict=True))
