"""Compiles the GPU kernels for compute capability 9.0, without a GPU: launchers are called, nothing is launched.

A script, since Triton decides at import whether it interprets. Prints a line a kernel: its name, and the bytes of
shared memory of its largest variant. Usage: compile_kernels.py [OP...]; left out, all ops. The first two examples of
each op are compiled.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from itertools import islice
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import outrider.kernels
from outrider.kernels import gpu
from outrider.kernels.op import Op


class NoDriver:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main(wanted: list[str]) -> None:
    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        shared[self.fn.__name__] = max(shared.get(self.fn.__name__, 0), kernel.metadata.shared)
        return kernel

    driver.set_active(NoDriver())
    JITFunction.run = compile_only
    for module in pkgutil.iter_modules(gpu.__path__):
        room = importlib.import_module(f"outrider.kernels.gpu.{module.name}")
        if hasattr(room, "overlaps"):
            room.overlaps = lambda x: True  # type: ignore[attr-defined]
    for module in pkgutil.iter_modules(outrider.kernels.__path__):
        for op in vars(importlib.import_module(f"outrider.kernels.{module.name}")).values():
            if isinstance(op, Op) and "cuda" in op.kernels and (op.name in wanted or not wanted):
                assert op.examples is not None
                examples = op.examples(torch.Generator().manual_seed(1), torch.device("cpu"), False)
                for example in islice(examples, 2):
                    op.kernels["cuda"](**example)
    for name, size in sorted(shared.items()):
        print(name, size)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "Triton must compile here, not interpret"
    main(sys.argv[1:])
