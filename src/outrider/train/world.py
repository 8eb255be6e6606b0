"""The processes that train together: data-parallel copies, started by torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from outrider import env
from outrider.errors import OptionError

BUCKET = 1 << 24
"""Numbers that are added up over processes at once."""

PATIENCE = timedelta(hours=6)
"""How long others wait while one process generates or evaluates."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> World:
        """Reads what torchrun says and meets the other processes; alone where it says nothing.

        Raises OptionError for a device that is not there.
        """
        rank, local_rank, size = env.process()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if size > 1 and device == "cuda":
            device = f"cuda:{local_rank}"
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise OptionError(f"unknown device: {device} (known: auto, cpu, cuda, cuda:N)") from None
        if chosen.type not in ("cpu", "cuda"):
            raise OptionError(f"device is not supported: {device} (known: auto, cpu, cuda, cuda:N)")
        if chosen.type == "cuda":
            if (chosen.index or 0) >= torch.cuda.device_count():
                raise OptionError(f"no such device: {device}; torch sees {torch.cuda.device_count()} CUDA devices")
            torch.cuda.set_device(chosen.index or 0)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(rank, size, chosen)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Makes each gradient the sum over all processes, some buckets at a time."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        while gradients:
            bucket: list[Tensor] = []
            numbers = 0
            while gradients and (not bucket or numbers + gradients[0].numel() <= BUCKET):
                bucket.append(gradients.pop(0))
                numbers += bucket[-1].numel()
            flat = self.add(torch.cat([gradient.flatten() for gradient in bucket]))
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def agree(self, value: float) -> float:
        """The first process's value, on all."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the meeting."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
