"""CUDA graphs, events and pinned memory: all that the graph runner asks of CUDA beyond tensors.

A recorded program is a CUDA graph that reads and writes the tensors it was recorded with. Programs share one pool of
memory for what lies between, since they run one after the other on one stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Fence(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Until all that was given to the device before it is done."""


class Recorder(Protocol):
    """Records functions of device tensors, to be replayed without Python."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """A function that does on the device what `body` does, to the tensors that `body` finds now.

        `body` is called more than once, and what it does must bear that.
        """

    def fetch(self, x: Tensor) -> Tensor:
        """A host tensor that holds x once the fence set next is passed."""

    def fence(self) -> Fence:
        """Marks the stream here."""

    def marks(self, names: tuple[str, ...]) -> Marks:
        """Points inside a program whose times can be measured."""

    def used(self) -> int:
        """Bytes of the device that are taken, by whomever, but for what is held in reserve."""


class Marks(Protocol):
    """Named points of a recorded program."""

    def __call__(self, name: str) -> None:
        """Sets a point, while the program is recorded."""

    def milliseconds(self, name: str, other: Marks, later: str) -> float:
        """From a point of this program's last run to one of another's; both runs must be over."""


class _CudaFence:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()


class _CudaMarks:
    def __init__(self, names: tuple[str, ...]) -> None:
        self._events: dict[str, Any] = {
            name: torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]
            for name in names
        }

    def __call__(self, name: str) -> None:
        self._events[name].record()

    def milliseconds(self, name: str, other: Marks, later: str) -> float:
        assert isinstance(other, _CudaMarks)
        elapsed: float = self._events[name].elapsed_time(other._events[later])
        return elapsed


class CudaRecorder:
    """A `Recorder` for one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # once for what compiles kernels or makes libraries' workspaces
            body()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            body()
        return graph.replay

    def fetch(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def fence(self) -> Fence:
        return _CudaFence(self._device)

    def marks(self, names: tuple[str, ...]) -> Marks:
        return _CudaMarks(names)

    def used(self) -> int:
        torch.cuda.empty_cache()  # recording gives back what torch holds in reserve: it must not be counted before
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
