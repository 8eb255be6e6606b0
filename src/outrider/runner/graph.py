"""The runner that records the step program: one CUDA graph per batch size, replayed; results read one step late.

A plan's rows that are past their prompt run in a recorded program: the smallest that has room for them, its spare rows
empty. The rows inside a prompt, whose shapes are never twice the same, follow as calls of the same program on the same
stream. The host sends what has changed (`SlotTable`), replays, and asks for the tokens to be copied to pinned memory;
it reads them when the next step has been given to the device. Nothing here waits for the device but `Pending.result`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from outrider.capability import Feature, Offer
from outrider.core.plan import Row, StepPlan, StepResult
from outrider.errors import CapacityError, UnsupportedError
from outrider.kernels.report import REPORT
from outrider.kernels.step_inputs import ASSEMBLE, load_draft
from outrider.models.decoder import Decoder
from outrider.parallel.mesh import Mesh
from outrider.runner.base import RunnerConfig
from outrider.runner.build import build_drafter, build_model
from outrider.runner.memory import MIB
from outrider.runner.recorder import CudaRecorder, Fence, Marks, Recorder
from outrider.runner.slots import SlotTable, to_device
from outrider.runner.step import Mark, StepProgram, unmarked
from outrider.verify.base import LogitsProcessor

logger = logging.getLogger("outrider")

PARTS = ("inputs", "target", "verify", "draft")
_START, _END = "start", "end"
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
_PROMPTS = (1, 4, 8, 16, 32, 48, 256)  # tokens of a prompt step; beyond, kernels differ no more
_TOGETHER = (8, 17, 32)  # short prompts of a step, from which on other kernels run: 8 key heads, 132 multiprocessors
_SHORT = 32  # tokens of a short prompt, at most
PROGRAM_BYTES = 4 * MIB
"""Of a recorded step: 2 to 3 MiB were measured for the shapes of Qwen3-0.6B and 8B (H100, torch 2.11)."""
_ONE_PROCESS = "the graph runner holds the whole model in one process; leave it at 1"


class Kind(NamedTuple):
    """What a recorded program does beside running the target."""

    drafts: bool  # verify drafts and make new ones; else one token a row
    processed: bool  # apply every logits processor; else none


@dataclass(slots=True)
class Recorded:
    """A program for up to `size` rows, that reads `rows` and writes `out`."""

    size: int
    rows: Tensor  # [size, 4] int64, the fields of `core.plan.Row`
    out: Tensor  # [size, K+3] int64: the verdict's tokens, their count, and how many drafts are waiting
    copies: list[tuple[Callable[[], None], Marks | None]]  # used in turn: marks are read while later steps set theirs
    turn: int = 0


class GraphPending:
    """A step given to the device."""

    def __init__(self, plan: StepPlan, parts: list[Tensor], fence: Fence, read: Callable[[], None]) -> None:
        self._plan, self._parts, self._fence, self._read = plan, parts, fence, read
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Waits until the device has passed the step."""
        if self._result is None:
            self._fence.wait()
            self._read()
            found = [row for part in self._parts for row in part.tolist()]
            tokens = tuple(tuple(row[: row[-2]]) for row in found)
            self._result = StepResult(self._plan.step, tokens, tuple(row[-1] for row in found))
            self._parts = []
        return self._result


class GraphRunner:
    """Replays recorded programs, and reads each step's tokens while the next one runs."""

    name: ClassVar[str] = "graph"
    depth: ClassVar[int] = 2
    offer: ClassVar[Offer] = Offer(
        has=frozenset(
            {
                Feature.TOKEN_HISTORY,
                Feature.FEATURES,
                Feature.DRAFT_CACHE,
                Feature.DRAFT_LOGITS,
                Feature.CUDA,
            }
        ),
        lacks={
            Feature.HOST_CODE: "a recorded step has no Python in it; write the part with tensors alone, or take the "
            "eager runner",
            Feature.CPU: "a CPU has no CUDA graphs to record; the eager runner is the fast one there",
            Feature.WITHOUT_TRITON: "the graph runner records Triton's kernels, and the plain torch ones would take "
            "many times their memory in each program; install Triton (pip install triton), or take the eager runner",
            Feature.OLD_CUDA: "the graph runner records Triton's kernels, which need a GPU of compute capability 8.0 "
            "(A100) or later; take one, or the eager runner",
            Feature.TENSOR: _ONE_PROCESS,
            Feature.PIPELINE: _ONE_PROCESS,
        },
    )
    recorder: ClassVar[Callable[[torch.device], Recorder]] = CudaRecorder

    def __init__(self, config: RunnerConfig, model: Decoder, progress: Callable[[int], None] | None = None) -> None:
        """Binds a loaded model to a cache, a drafter and slots, and records; use `build`."""
        self._config, self._device = config, config.device
        self._recorder = type(self).recorder(config.device)
        cache = model.cache_layout(config.block_size).allocate(config.memory.num_blocks, config.device)
        drafter = build_drafter(config, model, progress)
        self._num_drafts = drafter.num_drafts
        self._spare = config.max_num_seqs  # the slot of rows that are nobody's
        self._table = SlotTable(
            num_slots=config.max_num_seqs + 1,
            max_len=config.max_model_len,
            max_blocks=-(-config.max_model_len // config.block_size),
            drafter=drafter,
            verifier=config.verifier,
            processors=config.processors,
            device=config.device,
        )
        self._program = StepProgram(model, cache, drafter, config.verifier, config.device)
        self._assemble, self._report = ASSEMBLE.on(config.device), REPORT.on(config.device)
        self._recorded: dict[Kind, list[Recorded]] = {}
        self._last: Marks | None = None  # of the step read last
        self._spent = dict.fromkeys((*PARTS, "gap"), 0.0)
        self._num_timed = self._num_gaps = 0
        self._warm_up()
        self._record()

    @classmethod
    def footprint(cls, capture_sizes: Sequence[int], num_drafts: int) -> int:
        """What CUDA keeps for each program; what lies between its kernels is the plan's workspace."""
        return len(capture_sizes) * len(_kinds(num_drafts)) * PROGRAM_BYTES

    @classmethod
    def build(cls, config: RunnerConfig, mesh: Mesh) -> Self:
        """Loads the target's weights, makes everything that lives beside them, and records every program."""
        assert mesh == Mesh(), "the oracle refuses a split model for this runner"
        count = config.count_loaded()
        with torch.inference_mode():
            return cls(config, build_model(config, count), count)

    # Recording.

    def _record(self) -> None:
        """Every kind of step at every size, the largest first: smaller ones then lie in its memory."""
        start, before = time.perf_counter(), self._recorder.used()
        kinds = _kinds(self._num_drafts)
        sizes = self._config.capture_sizes
        done, total = 0, len(kinds) * len(sizes)
        self._recorded = {kind: [] for kind in kinds}
        for size in reversed(sizes):
            for kind in kinds:
                with self._explained(f"the program for {size} rows was recorded, after {done} of {total}"):
                    self._recorded[kind].insert(0, self._record_one(kind, size))
                done += 1
                if self._config.recording is not None:
                    self._config.recording(done, total)
        self.programs_bytes = max(self._recorder.used() - before, 0)
        self.programs_seconds = time.perf_counter() - start
        logger.info(
            "recorded %d programs, for up to %d rows, in %.1f s; they take %.0f MiB",
            total,
            sizes[-1],
            self.programs_seconds,
            self.programs_bytes / MIB,
        )

    def recorded(self) -> dict[str, float]:
        """What recording took."""
        return {"seconds": self.programs_seconds, "bytes": self.programs_bytes}

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Whatever goes wrong while the runner is built, in words that name a remedy."""
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
                f"the graph runner failed while {what}, with drafter {self._config.drafter.name}: {remedy}{said}"
            ) from error

    def _warm_up(self) -> None:
        """Steps of prompts, of sizes for which kernels differ, so that few are compiled while requests wait.

        They are the spare slot's, whose keys and values go where no request's are yet.
        """
        most, longest = self._config.max_num_batched_tokens, self._config.max_model_len - 1
        sizes = [min(size, most) for size in (*_PROMPTS, most)]
        steps = [[min(longest, size - start) for start in range(0, size, longest)] for size in sizes]
        short = [size for size in _PROMPTS if size <= min(_SHORT, longest)]
        steps += [[size] * count for count in _TOGETHER for size in short if size * count <= most]
        for lengths in sorted({tuple(lengths[: self._config.max_num_seqs]) for lengths in steps}):
            for ends_prompt in (0, 1):
                self._try_prompts(lengths, ends_prompt)

    def _try_prompts(self, lengths: tuple[int, ...], ends_prompt: int) -> None:
        slots = self._table.slots
        rows = torch.tensor([[self._spare, length, 0, ends_prompt] for length in lengths], device=self._device)
        out = torch.empty(len(lengths), self._num_drafts + 3, dtype=torch.int64, device=self._device)
        with self._explained(f"a prompt step of {sum(lengths)} tokens was tried"):
            num_logits = len(lengths) * ends_prompt
            self._run(rows, sum(lengths), num_logits, self._config.processors, self._num_drafts > 0, out)
        slots.length[self._spare].zero_()
        slots.computed[self._spare].zero_()

    def _record_one(self, kind: Kind, size: int) -> Recorded:
        width = self._num_drafts + 3
        rows = torch.tensor([[self._spare, 0, 0, 0]] * size, dtype=torch.int64, device=self._device)
        out = torch.empty(size, width, dtype=torch.int64, device=self._device)
        num_tokens = size * (self._num_drafts + 1 if kind.drafts else 1)
        num_tokens = min(num_tokens, self._config.max_num_batched_tokens)  # of all rows: no plan asks for more
        processors = self._config.processors if kind.processed else ()
        copies: list[tuple[Callable[[], None], Marks | None]] = []
        for _ in range(self.depth + 1 if self._config.time_parts else 1):
            marks = self._recorder.marks((_START, *PARTS, _END)) if self._config.time_parts else None

            def body(marks: Marks | None = marks) -> None:
                self._run(rows, num_tokens, num_tokens, processors, kind.drafts, out, marks or unmarked)

            copies.append((self._recorder.record(body), marks))
        return Recorded(size, rows, out, copies)

    def _run(
        self,
        rows: Tensor,  # [B, 4] int64
        num_query: int,
        num_logits: int,
        processors: tuple[LogitsProcessor, ...],
        drafts: bool,
        out: Tensor,  # [B, K+3] int64
        mark: Mark = unmarked,
    ) -> None:
        """The step program, from rows of numbers to rows of numbers."""
        mark(_START)
        slots = self._table.slots
        batch = self._assemble(slots, *rows.unbind(1), num_query, num_logits, self._config.block_size)
        draft = load_draft(slots, batch)
        mark("inputs")
        verdict, proposed = self._program(batch, draft, slots, processors, drafts, mark)
        self._report(verdict.tokens, verdict.count, None if proposed is None else proposed.length, out)
        mark(_END)

    # Running.

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> GraphPending:
        """Gives the plan to the device. The results of at most `depth` plans may be unread."""
        self._table.update(plan)
        ready = next((at for at, row in enumerate(plan.rows) if not _is_decode(row)), len(plan.rows))
        drafts, processors = self._table.drafts(plan), self._table.processors()
        found, read = [], _nothing
        if ready:
            recorded = self._find(Kind(drafts, bool(processors)), ready)
            read = self._replay(recorded, plan.rows[:ready])
            found.append(self._recorder.fetch(recorded.out[:ready]))
        if ready < len(plan.rows):
            read = self._forget_last  # the gap to the next step is full of prompts
            found.append(self._recorder.fetch(self._call(plan.rows[ready:], processors, drafts)))
        return GraphPending(plan, found, self._recorder.fence(), read)

    def _find(self, kind: Kind, num_rows: int) -> Recorded:
        return next(recorded for recorded in self._recorded[kind] if recorded.size >= num_rows)

    def _replay(self, recorded: Recorded, rows: tuple[Row, ...]) -> Callable[[], None]:
        """Runs rows in a recorded program; what it gives is to be called once the run is over."""
        numbers = np.empty((recorded.size, len(Row._fields)), np.int64)
        numbers[: len(rows)] = rows
        numbers[len(rows) :] = (self._spare, 0, 0, 0)
        recorded.rows.copy_(to_device(numbers, self._device), non_blocking=True)
        replay, marks = recorded.copies[recorded.turn % len(recorded.copies)]
        recorded.turn += 1
        replay()
        return _nothing if marks is None else lambda: self._take_times(marks)

    def _call(self, rows: tuple[Row, ...], processors: tuple[LogitsProcessor, ...], drafts: bool) -> Tensor:
        """Runs rows that are inside their prompts, or leave them."""
        numbers = to_device(np.array(rows, np.int64), self._device)
        out = torch.empty(len(rows), self._num_drafts + 3, dtype=torch.int64, device=self._device)
        num_logits = sum(row.num_drafts + 1 for row in rows if row.ends_prompt)
        self._run(numbers, sum(row.num_tokens for row in rows), num_logits, processors, drafts, out)
        return out

    # Times.

    def _take_times(self, marks: Marks) -> None:
        for part, before in zip(PARTS, (_START, *PARTS), strict=False):
            self._spent[part] += marks.milliseconds(before, marks, part)
        if self._last is not None and self._last is not marks:
            self._spent["gap"] += self._last.milliseconds(_END, marks, _START)
            self._num_gaps += 1
        self._last = marks
        self._num_timed += 1

    def _forget_last(self) -> None:
        self._last = None

    def part_times(self) -> dict[str, float] | None:
        """Mean milliseconds on the device of the parts of a decode step since the last call, and of the gap before it.

        None unless the configuration asks for `time_parts`.
        """
        if not self._config.time_parts:
            return None
        counts = dict.fromkeys(PARTS, self._num_timed) | {"gap": self._num_gaps}
        times = {part: spent / max(counts[part], 1) for part, spent in self._spent.items()}
        self._spent, self._num_timed, self._num_gaps = dict.fromkeys(self._spent, 0.0), 0, 0
        return times

    def reset(self) -> None:
        """Empties the slots, once the device is done with what it was given."""
        self._recorder.fence().wait()
        self._table.reset()
        self._last = None

    def close(self) -> None:
        """Drops the programs, the model and the cache."""
        self._recorder.fence().wait()
        self._recorded.clear()
        del self._program, self._table


def _kinds(num_drafts: int) -> list[Kind]:
    """What is recorded at every size."""
    return [Kind(drafts, processed) for drafts in {num_drafts > 0, False} for processed in (False, True)]


def _is_decode(row: Row) -> bool:
    """Whether each of a row's tokens gives logits, so that a recorded program can run it."""
    return row.ends_prompt and row.num_tokens == row.num_drafts + 1


def _nothing() -> None:
    """There are no times to take."""
