"""Recorded step programs: what is recorded, and which of them a step takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.core.sizes import MIB
from outrider.errors import CapacityError, UnsupportedError
from outrider.runner.base import RunnerConfig
from outrider.runner.bound import Bound
from outrider.runner.capture import CaptureOptions
from outrider.runner.recorder import Marks, Recorder
from outrider.runner.step import unmarked
from outrider.runner.timing import END, MARKS, START
from outrider.verify.base import ActiveProcessor

logger = logging.getLogger("outrider")

PROGRAM_BYTES = 4 * MIB
"""Of a recorded step: 2 to 3 MiB were measured for the shapes of Qwen3-0.6B and 8B (H100, torch 2.11)."""
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


class Kind(NamedTuple):
    """What a recorded program does beside running the target."""

    num_drafts: int  # most drafts that it verifies a row: it runs size * (num_drafts + 1) tokens
    processed: bool  # applies every logits processor; else none
    drafting: bool  # makes drafts for the rows' next step


@dataclass(slots=True, eq=False)
class Recorded:
    """A program for up to `size` rows, that reads `rows` and writes `out`."""

    size: int
    rows: Tensor  # [size, 4] int64, the fields of `core.plan.Row`
    out: Tensor  # [size, W] int64, as `ResultLayout` packs it
    copies: list[tuple[Callable[[], None], Marks | None]]  # used in turn: marks are read while later steps set theirs
    turn: int = 0

    def replay(self) -> Marks | None:
        """Runs the program; the marks that it sets, if it is timed."""
        run, marks = self.copies[self.turn % len(self.copies)]
        self.turn += 1
        run()
        return marks


class Programs:
    """Every program that a runner has recorded."""

    def __init__(self, config: RunnerConfig, bound: Bound, recorder: Recorder, spare: int, depth: int) -> None:
        """Records every kind at every size, the largest first: smaller ones then lie in its memory.

        `spare` is the slot of rows that belong to no request, `depth` how many steps may be unread.
        """
        self._config, self._bound, self._recorder = config, bound, recorder
        self._spare, self._num_copies = spare, depth + 1 if config.capture.time_parts else 1
        start, before = time.perf_counter(), recorder.used()
        kinds, sizes = _kinds(config.capture), config.capture.sizes
        self._recorded: dict[Kind, list[Recorded]] = {kind: [] for kind in kinds}
        done, total = 0, len(kinds) * len(sizes)
        for size in reversed(sizes):
            for kind in reversed(kinds):
                what = f"the program for {size} rows was recorded, after {done} of {total}"
                with explained(what, config.drafter.name):
                    self._recorded[kind].insert(0, self._record(kind, size))
                done += 1
                if config.recording is not None:
                    config.recording(done, total)
        self.bytes = max(recorder.used() - before, 0)
        self.seconds = time.perf_counter() - start
        logger.info(
            "recorded %d programs, for up to %d rows, in %.1f s; they take %.0f MiB",
            total,
            sizes[-1],
            self.seconds,
            self.bytes / MIB,
        )

    @staticmethod
    def footprint(capture: CaptureOptions) -> int:
        """What CUDA keeps for all programs; what lies between their kernels is the plan's workspace."""
        return len(capture.sizes) * len(_kinds(capture)) * PROGRAM_BYTES

    def find(self, wanted: Kind, num_rows: int) -> Recorded:
        """The smallest program that verifies as many drafts a row as wanted, and has room for the rows."""
        kind = next(kind for kind in self._recorded if _serves(kind, wanted))
        return next(recorded for recorded in self._recorded[kind] if recorded.size >= num_rows)

    def clear(self) -> None:
        """Gives back what the programs hold."""
        self._recorded.clear()

    def _record(self, kind: Kind, size: int) -> Recorded:
        device, bound = self._config.device, self._bound
        rows = torch.tensor([[self._spare, 0, 0, 0]] * size, dtype=torch.int64, device=device)
        out = bound.results.table(size, device)
        # No plan asks for more tokens, of all rows together, than a step may run.
        num_tokens = min(size * (kind.num_drafts + 1), self._config.sizes.max_num_batched_tokens)
        processors: tuple[ActiveProcessor, ...] = bound.table.all_processors if kind.processed else ()
        copies: list[tuple[Callable[[], None], Marks | None]] = []
        for _ in range(self._num_copies):
            marks = self._recorder.marks(MARKS) if self._config.capture.time_parts else None

            def body(marks: Marks | None = marks) -> None:
                mark = marks or unmarked
                mark(START)
                output = bound.run(rows, num_tokens, num_tokens, processors, kind.drafting, mark)
                bound.results.pack(output, out)
                mark(END)

            copies.append((self._recorder.record(body), marks))
        return Recorded(size, rows, out, copies)


def _kinds(capture: CaptureOptions) -> Sequence[Kind]:
    """What is recorded at every size; of those that serve a step, the one that runs the fewest tokens is first."""
    drafting = [(num_drafts, True) for num_drafts in capture.num_drafts if capture.num_drafts[-1]]
    return [Kind(num, processed, drafts) for num, drafts in ((0, False), *drafting) for processed in (False, True)]


def _serves(kind: Kind, wanted: Kind) -> bool:
    return kind.num_drafts >= wanted.num_drafts and kind[1:] == wanted[1:]


@contextmanager
def explained(what: str, drafter: str) -> Iterator[None]:
    """Whatever goes wrong while a runner is built, in words that name a remedy."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in _OUT_OF_MEMORY):
            raise CapacityError(
                f"memory ran out while {what}: lower gpu_memory_utilization or kv_cache_memory so that the "
                "key/value cache leaves more, or max_num_seqs or max_num_batched_tokens, or give fewer "
                "capture_sizes"
            ) from error
        remedy = ""
        if "captur" in said:
            remedy = "a part that reads tensors on the host must need HOST_CODE, which the eager runner offers; "
        raise UnsupportedError(
            f"the graph runner failed while {what}, with drafter {drafter}: {remedy}{said}"
        ) from error
