"""The training loop: batches, steps of the optimizer, the log, evaluation and checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.errors import CheckpointError, DataError, OptionError, OutriderError
from outrider.train.data import Documents
from outrider.train.objective import Objective
from outrider.train.options import CommonOptions
from outrider.train.packing import Batch, Stream, pack
from outrider.train.teacher import Teacher
from outrider.train.world import World

BETAS = (0.9, 0.95)
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
MAY_CHANGE = frozenset({"out", "log_every", "eval_every", "save_every", "resume", "device", "compile", "dtype"})
"""Options that a resumed run may set otherwise; all others shape the loss curve."""

Report = Callable[[float, str], None]
"""Called with the share of the run that is done, and a line about it."""


class DivergedError(OutriderError, RuntimeError):
    """The loss is not a number any more."""


@dataclass(slots=True)
class Progress:
    """How far a run is: all that resuming needs beside weights and optimizer. Randomness is a function of the step."""

    step: int = 0
    epoch: int = 0
    row: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over the trained elements of some batches."""

    loss: list[float]  # by depth: KL(target || draft) in nats
    accuracy: list[float]  # by depth: how often the most likely tokens agree
    elements: list[int]  # by depth

    @classmethod
    def of(cls, sums: Tensor) -> Figures:
        """From [3, depths] sums of loss, agreement and number."""
        loss, agreeing, number = sums.double().cpu()
        safe = number.clamp(min=1)
        return cls((loss / safe).tolist(), (agreeing / safe).tolist(), number.long().tolist())

    @property
    def mean_loss(self) -> float:
        """Over the elements of all depths."""
        total = sum(self.elements)
        return sum(loss * count for loss, count in zip(self.loss, self.elements, strict=True)) / max(total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Rounded for a log."""
        return {
            "loss": self.mean_loss,
            "loss_by_depth": [round(loss, 5) for loss in self.loss],
            "accuracy_by_depth": [round(accuracy, 5) for accuracy in self.accuracy],
        }


class Trainer:
    """Trains a head against a frozen target."""

    def __init__(
        self,
        options: CommonOptions,
        objective: Objective,
        teacher: Teacher,
        vocabulary: Tensor | None,  # the drafted tokens on the device, None: all
        world: World,
        report: Report | None = None,
    ) -> None:
        """Checks what the options say together; resumes if asked. Raises OptionError or CheckpointError."""
        self.options, self.world, self.out = options, world, Path(options.out or ".")
        self.objective, self.head, self.teacher = objective, objective.head, teacher
        self._vocabulary, self._report = vocabulary, report
        if options.steps is None and options.epochs is None and options.minutes is None:
            raise OptionError("say how long to train: --steps, --epochs or --minutes")
        each = options.max_length * world.size
        if options.batch_tokens % each or options.batch_tokens < each:
            raise OptionError(
                f"batch_tokens {options.batch_tokens} must be a multiple of max_length {options.max_length} "
                f"times {world.size} processes: {each}"
            )
        self.num_rows = options.batch_tokens // options.max_length  # over all processes
        self.progress = Progress()
        self._parameters = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        self.optimizers = self._make_optimizers()
        if options.resume:
            self._load()

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for everything, or Muon for the matrices between embedding and lm_head, whose updates it equalises."""
        options, fused = self.options, self.world.device.type == "cuda"
        trained = {name: parameter for name, parameter in self.head.named_parameters() if parameter.requires_grad}
        inner = [parameter for name, parameter in trained.items() if name.startswith(("layers.", "fc."))]
        by_muon = [parameter for parameter in inner if parameter.dim() == 2 and options.optimizer == "muon"]
        others = [parameter for parameter in trained.values() if not any(parameter is one for one in by_muon)]
        groups = [
            {"params": [each for each in others if each.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [each for each in others if each.dim() == 1], "weight_decay": 0.0},
        ]
        made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=fused)]
        if by_muon:
            decay = options.weight_decay
            made.append(torch.optim.Muon(by_muon, lr=options.muon_lr, weight_decay=decay, adjust_lr_fn="original"))
        for optimizer in made:
            for group in optimizer.param_groups:
                group["highest_lr"] = group["lr"]
        return made

    def train(self, documents: Documents, held_out: Documents | None) -> dict[str, Any]:
        """Trains to the end; returns the final figures. Raises DivergedError if the loss is lost."""
        options, progress = self.options, self.progress
        stream = Stream(documents, options.max_length, options.seed, progress.epoch, progress.row)
        before, began, epochs = progress.seconds, time.perf_counter(), stream.epochs
        share, sums, last = self._share(epochs), self._no_sums(), (began, progress.tokens)
        settled = None  # time and tokens when the first line was logged: all is compiled by then
        with ThreadPoolExecutor(1) as pool:
            coming = self._fetch(pool, stream)
            while share < 1:
                rows, epochs, epoch, row = coming.result()
                coming = self._fetch(pool, stream)
                rate = self._rate(share)
                sums += self._step(rows, rate)
                progress.step, progress.epoch, progress.row = progress.step + 1, epoch, row
                progress.tokens += options.batch_tokens
                figures = None
                if progress.step % options.log_every == 0:
                    figures, last = self._log(sums, rate, last)
                    sums, settled = self._no_sums(), settled or last
                progress.seconds = before + time.perf_counter() - began
                if options.minutes is None or figures is not None:  # the clock is read where the device is waited for
                    share = self._share(epochs)
                if figures is not None and self._report is not None and self.world.is_first:
                    accuracy = " ".join(f"{value:.2f}" for value in figures.accuracy)
                    self._report(share, f"loss {figures.mean_loss:.3f}, accuracy {accuracy}")
                if self._due(options.eval_every, share):
                    self._write({"step": progress.step, "held_out": self._evaluated(held_out)})
                if self._due(options.save_every, share):
                    self.save()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        since, tokens = settled or (began, progress.tokens)
        now, tokens = time.perf_counter(), progress.tokens - tokens
        self.save()
        return {
            "steps": progress.step,
            "tokens": progress.tokens,
            "epochs": epochs,
            "seconds": round(progress.seconds, 2),
            "tokens_per_second": round(tokens / (now - since)) if tokens else None,
            "peak_memory": self._peak_memory(),
            "held_out": self._evaluated(held_out),
        }

    def _fetch(self, pool: ThreadPoolExecutor, stream: Stream) -> Future[tuple[NDArray[np.int32], float, int, int]]:
        def take() -> tuple[NDArray[np.int32], float, int, int]:
            rows = stream.take(self.num_rows)
            return rows, stream.epochs, stream.epoch, stream.row

        return pool.submit(take)

    def _step(self, rows: NDArray[np.int32], rate: float) -> Tensor:
        """One step of the optimizer; [3, depths] sums over this process's rows. Nothing is read on the host."""
        batch, uniform = self._shard(rows, self.progress.step)
        sums = self._run(batch, uniform, backward=True)
        self.world.add_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, self.options.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["highest_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return sums

    def _run(self, batch: Batch, uniform: Tensor, backward: bool) -> Tensor:
        """Evaluation is the same pass without its backward half, so that nothing is compiled for it again."""
        truth = self.teacher.truth(batch, self._vocabulary)
        elements = self.objective.elements(batch, truth, uniform)
        weights = self.objective.weights(self.world.add(elements.counts()))
        return self.objective.run(batch, truth, elements, weights, backward)

    def _shard(self, rows: NDArray[np.int32], step: int) -> tuple[Batch, Tensor]:
        """This process's rows, and random numbers that depend on (seed, step, row) and not on who has the row."""
        device, count = self.world.device, rows.shape[1]
        generator = torch.Generator(device).manual_seed(1_000_003 * self.options.seed + step)
        uniform = torch.rand(count, self.options.max_length, generator=generator, device=device)
        first, last = (rank * count // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        return Batch.of(np.ascontiguousarray(rows[:, first:last]), device), uniform[first:last]

    def evaluate(self, documents: Documents) -> Figures:
        """Figures over documents that are not trained on; the same at every call with the same weights."""
        packing = pack(documents, self.options.max_length, 0, 0)
        sums, size = self._no_sums(), self.num_rows
        for step, first in enumerate(range(0, len(packing), size)):
            rows = packing.rows(first, min(first + size, len(packing)))
            short = size - rows.shape[1]
            if short:  # empty rows: no element of theirs is trained
                rows = np.concatenate((rows, np.repeat(_empty(rows), short, axis=1)), axis=1)
            batch, uniform = self._shard(rows, step)
            sums += self._run(batch, uniform, backward=False)
        return Figures.of(self.world.add(sums))

    def _evaluated(self, documents: Documents | None) -> dict[str, Any] | None:
        return None if documents is None else self.evaluate(documents).to_dict()

    def _no_sums(self) -> Tensor:
        return torch.zeros(3, self.objective.num_depths, device=self.world.device)

    def _share(self, epochs: float) -> float:
        """How much of the run is done: the largest share of any limit."""
        options, progress, shares = self.options, self.progress, [0.0]
        if options.steps is not None:
            shares.append(progress.step / options.steps)
        if options.epochs is not None:
            shares.append(epochs / options.epochs if progress.step else 0.0)
        if options.minutes is not None:
            shares.append(self.world.agree(progress.seconds) / (60 * options.minutes))
        return max(shares)

    def _rate(self, share: float) -> float:
        """Share of the highest learning rate: a linear rise, then the decay asked for."""
        left = max(0.0, 1 - share)
        decay = left if self.options.lr_decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        rise = min(1.0, (self.progress.step + 1) / max(1, self.options.warmup_steps))
        return rise * decay

    def _due(self, every: int | None, share: float) -> bool:
        """Whether the step just done is one of every so many; the last is taken care of at the end."""
        return every is not None and share < 1 and self.progress.step % every == 0

    def _log(self, sums: Tensor, rate: float, last: tuple[float, int]) -> tuple[Figures, tuple[float, int]]:
        """Writes a line on the steps since the last; the only place in the loop that waits for the device."""
        figures, now = Figures.of(self.world.add(sums)), time.perf_counter()
        progress = self.progress
        if not math.isfinite(figures.mean_loss):
            raise DivergedError(
                f"the loss is {figures.mean_loss} at step {progress.step}: lower --lr, or resume from an earlier save"
            )
        if not sum(figures.elements):
            raise DataError(
                f"no token was trained up to step {progress.step}: documents are too short, or all of them is prompt"
            )
        record = {
            "step": progress.step,
            "epoch": progress.epoch,
            "tokens": progress.tokens,
            "lr": rate * self.options.lr,
        }
        record |= figures.to_dict()
        record["tokens_per_second"] = round((progress.tokens - last[1]) / (now - last[0]))
        record["peak_memory"] = self._peak_memory()
        self._write(record)
        return figures, (now, progress.tokens)

    def _peak_memory(self) -> int:
        """Bytes: the most the GPU's allocator held, or what this process holds."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(psutil.Process().memory_info().rss)

    def _write(self, record: dict[str, Any]) -> None:
        if self.world.is_first:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def save(self) -> None:
        """Writes the checkpoint, replacing the last one at once."""
        if self.world.is_first:
            state = {
                "head": self.head.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "progress": asdict(self.progress),
                "options": asdict(self.options),
            }
            torch.save(state, self.out / f"{CHECKPOINT}.tmp")
            (self.out / f"{CHECKPOINT}.tmp").replace(self.out / CHECKPOINT)
        self.world.wait()

    def _load(self) -> None:
        path = self.out / CHECKPOINT
        if not path.exists():
            raise CheckpointError(f"nothing to resume: no {path}; leave --resume out to start again")
        try:
            state = torch.load(path, map_location=self.world.device, weights_only=True)
        except (RuntimeError, OSError, EOFError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; is it complete?") from error
        for name, value in asdict(self.options).items():
            then = state["options"].get(name)
            if name not in MAY_CHANGE and _plain(value) != _plain(then):
                raise OptionError(f"{path} was made with {name} {then}, not {value}: resume with what it was made with")
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        if self.world.is_first and (self.out / LOG).exists():
            lines = (self.out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= self.progress.step]
            (self.out / LOG).write_text("".join(kept), encoding="utf-8")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _empty(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """One row like these with no document in it."""
    row = np.zeros_like(rows[:, :1])
    row[1] = np.iinfo(np.int32).max >> 1
    return row
