"""What every contract ends with: an `Op`, from which dispatch, the kernel tests and the microbenchmark come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

FOLDERS = {"cpu": "cpu", "cuda": "gpu"}
"""Where the kernels of a device type lie, beside the contracts."""


HAS_TRITON = find_spec("triton") is not None
"""Whether GPU kernels can run: without Triton the references serve a GPU too."""

MIN_CAPABILITY = (8, 0)
"""Of a GPU that the kernels are for: what came before has no bfloat16."""


def triton_serves(device: torch.device) -> bool:
    """Whether GPU kernels run on a CUDA device; where there is none they may be interpreted."""
    return HAS_TRITON and (not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY)


@cache
def device_file(device_type: str, file: str) -> ModuleType:
    """A file of `kernels/cpu` ("cpu") or `kernels/gpu` ("cuda"), imported when it is first asked for."""
    return import_module(f"outrider.kernels.{FOLDERS[device_type]}.{file}")


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """One operation: a reference that defines it, and kernels that must agree with it.

    The reference runs wherever torch does. For a device type in `kernels` there is a faster function of the same
    signature: for the op `NAME` of `kernels/FILE.py` it is `NAME_cpu` in `kernels/cpu/FILE.py`, or `NAME_gpu` in
    `kernels/gpu/FILE.py`. The first `on(device)` imports that file, so a contract needs neither numba nor Triton.

    Other devices run the reference, as does a GPU where Triton is not installed, or too old for it. Nothing is chosen
    by trying: a kernel that is declared and cannot run is a bug.
    """

    name: str
    reference: Callable[P, R]
    kernels: tuple[str, ...] = ("cpu", "cuda")
    outputs: tuple[str, ...] = ()  # arguments written in place, compared beside what is returned
    tolerance: float = 1e-5  # largest ||kernel - reference|| / ||reference|| in float32; rounding to less adds to it
    tolerance_16bit: float = 5e-3  # the same where numbers are of 16 bits: two units in the last place, most by less
    why: str = ""  # the reason for a tolerance other than float32 rounding
    _found: dict[str, Callable[P, R]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device | str) -> Callable[P, R]:
        """The function that serves a device; resolve it once, outside the step."""
        device = torch.device(device)
        if device.type not in self.kernels or (device.type == "cuda" and not triton_serves(device)):
            return self.reference
        return self.kernel(device.type)

    def kernel(self, device_type: str) -> Callable[P, R]:
        """The kernel declared for "cpu" or "cuda", whether or not such a device is there."""
        assert device_type in self.kernels, f"{self.name} has no kernel for {device_type}"
        if device_type not in self._found:
            self._found[device_type] = getattr(self.module(device_type), f"{self.name}_{FOLDERS[device_type]}")
        return self._found[device_type]

    def module(self, device_type: str) -> ModuleType:
        """The file of the kernel for "cpu" or "cuda"."""
        return device_file(device_type, self.file)

    @property
    def file(self) -> str:
        """The name of the contract's file, which its kernels' files share."""
        return self.reference.__module__.rpartition(".")[2]
