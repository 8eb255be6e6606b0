"""The runner that records the step program: CUDA graphs by batch size, replayed; results read one step late.

A plan's rows that are past their prompt run in a recorded program: the smallest that has room for them, its spare rows
empty. The rows inside a prompt, whose shapes are never twice the same, follow as calls of the same program on the same
stream. The host sends what has changed (`SlotTable`), replays, and asks for the tokens to be copied to pinned memory;
it reads them when the next step has been given to the device. Nothing here waits for the device but `Pending.result`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.capability import Feature, Offer
from outrider.core.plan import Row, StepPlan, StepResult
from outrider.kernels.op import device_file
from outrider.models.decoder import Decoder
from outrider.parallel.mesh import Mesh
from outrider.runner.base import RunnerConfig
from outrider.runner.bound import Bound, build_model, rows_of
from outrider.runner.capture import CaptureOptions
from outrider.runner.programs import Kind, Programs, explained
from outrider.runner.recorder import CudaRecorder, Fence, Marks, Recorder
from outrider.runner.results import ResultLayout
from outrider.runner.slots import to_device
from outrider.runner.timing import PartTimes
from outrider.verify.base import ActiveProcessor

_ONE_PROCESS = "the graph runner holds the whole model in one process; leave it at 1"
_LACKS = {
    Feature.HOST_CODE: "a recorded step has no Python in it; write the part with tensors alone, or take the "
    "eager runner",
    Feature.CPU: "a CPU has no CUDA graphs to record; the eager runner is the fast one there",
    Feature.WITHOUT_TRITON: "the graph runner records Triton's kernels, and the plain torch ones would take "
    "many times their memory in each program; install Triton (pip install triton), or take the eager runner",
    Feature.OLD_CUDA: "the graph runner records Triton's kernels, which need a GPU of compute capability 8.0 "
    "(A100) or later; take one, or the eager runner",
    Feature.TENSOR: _ONE_PROCESS,
    Feature.PIPELINE: _ONE_PROCESS,
}


class GraphPending:
    """A step given to the device."""

    def __init__(
        self,
        step: int,
        layout: ResultLayout,
        tables: list[Tensor],
        fence: Fence,
        read: Callable[[], None],
        note: Callable[[StepResult], StepResult],
    ) -> None:
        """`tables` hold the step's results once the fence is passed. `read` and `note` are called then."""
        self._step, self._layout, self._tables, self._fence = step, layout, tables, fence
        self._read, self._note = read, note
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Waits until the device has passed the step."""
        if self._result is None:
            self._fence.wait()
            self._read()
            table = self._tables[0] if len(self._tables) == 1 else torch.cat(self._tables)
            self._result = self._note(self._layout.read(self._step, self._layout.unpack(table)))
            self._tables = []
        return self._result


class GraphRunner:
    """Replays recorded programs, and reads each step's tokens while the next one runs."""

    name: ClassVar[str] = "graph"
    depth: ClassVar[int] = 2
    offer: ClassVar[Offer] = Offer(
        has=frozenset(
            {Feature.TOKEN_HISTORY, Feature.FEATURES, Feature.DRAFT_CACHE, Feature.DRAFT_LOGITS, Feature.CUDA}
        ),
        lacks=_LACKS,
    )
    recorder: ClassVar[Callable[[torch.device], Recorder]] = CudaRecorder

    def __init__(self, config: RunnerConfig, model: Decoder, count: Callable[[int], None] | None = None) -> None:
        """Binds a loaded model, tries prompts and records; use `build`."""
        self._config, self._device = config, config.device
        self._recorder = type(self).recorder(config.device)
        self._spare = config.sizes.max_num_seqs  # the slot of rows that belong to no request
        self._bound = Bound(config, model, config.sizes.max_num_seqs + 1, count)
        self._times = PartTimes()
        self._warm_up()
        self._programs = Programs(config, self._bound, self._recorder, self._spare, self.depth)
        self._bound.serve()

    @classmethod
    def footprint(cls, capture: CaptureOptions) -> int:
        """What CUDA keeps for the programs."""
        return Programs.footprint(capture)

    @classmethod
    def build(cls, config: RunnerConfig, mesh: Mesh) -> Self:
        """Loads the target's weights, makes everything that lives beside them, and records every program."""
        assert mesh == Mesh(), "the oracle refuses a split model for this runner"
        count = config.count_loaded()
        with torch.inference_mode():
            return cls(config, build_model(config, count), count)

    def _warm_up(self) -> None:
        """Steps of prompts, so that few kernels are compiled while requests wait.

        They are the spare slot's, whose keys and values go where no request's are yet.
        """
        config, slots, drafting = self._config, self._bound.table.slots, self._bound.num_drafts > 0
        sizes = (config.sizes.max_num_batched_tokens, config.sizes.max_model_len - 1, config.sizes.max_num_seqs)
        warmup = device_file("cuda", "warmup")  # which imports Triton: a CPU has no graph runner
        for lengths in warmup.shapes(self._device, config.model_config.num_kv_heads, *sizes):
            for ends_prompt in (False, True):
                rows = [Row(self._spare, length, 0, ends_prompt) for length in lengths]
                with explained(f"a prompt step of {sum(lengths)} tokens was tried", config.drafter.name):
                    self._call(np.array(rows, np.int64), self._bound.table.all_processors, drafting)
                slots.length[self._spare].zero_()
                slots.computed[self._spare].zero_()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> GraphPending:
        """Gives the plan to the device. The results of at most `depth` plans may be unread."""
        table, read, found = self._bound.table, _nothing, []
        table.update(plan)
        drafting, processors = table.drafts(plan), table.processors()
        rows = rows_of(plan)
        ready = _count_decodes(rows)
        if ready:
            out, marks = self._replay(rows[:ready], bool(processors), drafting)
            found.append(self._recorder.fetch(out))
            if marks is not None:
                read = lambda: self._times.add(marks)  # noqa: E731
        if ready < len(rows):
            read = self._times.skip_gap  # the gap to the next step is full of prompts
            found.append(self._recorder.fetch(self._call(rows[ready:], processors, drafting)))
        guard = self._bound.guard
        num_wrong = None if guard.num_wrong is None else self._recorder.fetch(guard.num_wrong)
        note = partial(guard.note, num_wrong=num_wrong)
        return GraphPending(plan.step, self._bound.results, found, self._recorder.fence(), read, note)

    def _replay(self, rows: NDArray[np.int64], processed: bool, drafting: bool) -> tuple[Tensor, Marks | None]:
        """Runs rows past their prompt in a recorded program: their results, and its marks."""
        recorded = self._programs.find(Kind(int(rows[:, 2].max()), processed, drafting), len(rows))
        padded = np.empty((recorded.size, len(Row._fields)), np.int64)
        padded[: len(rows)] = rows
        padded[len(rows) :] = (self._spare, 0, 0, 0)
        recorded.rows.copy_(to_device(padded, self._device), non_blocking=True)
        marks = recorded.replay()
        return recorded.out[: len(rows)], marks

    def _call(self, rows: NDArray[np.int64], processors: Sequence[ActiveProcessor], drafting: bool) -> Tensor:
        """Runs rows that are inside their prompts, or leave them: their results."""
        _, num_tokens, num_drafts, ends_prompt = rows.T
        num_logits = int(((num_drafts + 1) * ends_prompt).sum())
        sent = to_device(rows, self._device)
        output = self._bound.run(sent, int(num_tokens.sum()), num_logits, processors, drafting)
        out = self._bound.results.table(len(rows), self._device)
        self._bound.results.pack(output, out)
        return out

    def recorded(self) -> dict[str, float]:
        """As `Records.recorded`."""
        return {"seconds": self._programs.seconds, "bytes": self._programs.bytes}

    def part_times(self) -> dict[str, float] | None:
        """As `TimesParts.part_times`."""
        return self._times.means() if self._config.capture.time_parts else None

    def reset(self) -> None:
        """Empties the slots, once the device is done with what it was given."""
        self._recorder.fence().wait()
        self._bound.table.reset()
        self._times.skip_gap()

    def close(self) -> None:
        """Drops the programs, the model and the cache."""
        self._recorder.fence().wait()
        self._programs.clear()
        del self._bound


def _count_decodes(rows: NDArray[np.int64]) -> int:
    """How many rows come before the first with a token that gives no logits: those a recorded program can run."""
    _, num_tokens, num_drafts, ends_prompt = rows.T
    others = np.flatnonzero((ends_prompt == 0) | (num_tokens != num_drafts + 1))
    return int(others[0]) if len(others) else len(rows)


def _nothing() -> None:
    """There are no times to take."""
