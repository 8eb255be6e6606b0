"""Compiles the GPU kernels without a GPU: launchers are called, nothing is launched.

A script, since Triton decides at import whether it interprets. Prints a line a kernel: its name, and the bytes of
shared memory of its largest variant. Usage: compile_kernels.py [CAPABILITY], 90 if left out: for that all ops with
their first two examples and products that need much shared memory; for any other products alone, also of larger sizes.
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

from kernel_examples import examples
from outrider.bench.kernels import all_ops
from outrider.kernels import gpu
from outrider.kernels.gpu.linear import FEW, TICKETS, few_rows, linear_gpu
from outrider.kernels.gpu.rope_attention import rope_attention_gpu
from outrider.kernels.rope_attention import ROPE_ATTENTION


class NoDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def ops() -> None:
    """Every op of which a GPU has a kernel."""
    for op in all_ops():
        assert "cuda" in op.kernels
        for example in islice(examples(op, torch.Generator().manual_seed(1), torch.device("cpu"), False), 2):
            op.kernel("cuda")(**example)


def attention() -> None:
    """As a layer asks for it: what the interpreter knows nothing of is compiled here and nowhere else without a GPU."""
    example = next(iter(examples(ROPE_ATTENTION, torch.Generator().manual_seed(1), torch.device("cpu"), False)))
    rope_attention_gpu(**example, ahead=True, next_weight=torch.empty(4096, 1024, dtype=torch.bfloat16))


SMALL = ((1024, 3072, False), (6144, 2048, True))
LARGE = ((6144, 4096, False), (4096, 12288, False), (12288, 4096, True), (17408, 5120, True))


def products(shapes: tuple[tuple[int, int, bool], ...]) -> None:
    """What a layer and a vocabulary ask of products of few rows."""
    tickets = torch.zeros(TICKETS, dtype=torch.int32)
    for rows in (1, 8, 16, FEW):
        for outputs, inputs, gate in shapes:
            x, weight = torch.empty(rows, inputs), torch.empty((1 + gate) * outputs, inputs, dtype=torch.bfloat16)
            out = torch.empty(rows, outputs, dtype=torch.bfloat16)
            few_rows(x.bfloat16(), weight, out, gate=gate, tickets=tickets)
    linear_gpu(torch.empty(8, 4096, dtype=torch.bfloat16), torch.empty(32000, 4096, dtype=torch.bfloat16), upcast=True)


def main(capability: int = 90) -> None:
    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        shared[self.fn.__name__] = max(shared.get(self.fn.__name__, 0), kernel.metadata.shared)
        return kernel

    driver.set_active(NoDriver(capability))
    JITFunction.run = compile_only
    for module in pkgutil.iter_modules(gpu.__path__):
        room = importlib.import_module(f"outrider.kernels.gpu.{module.name}")
        if hasattr(room, "overlaps"):
            room.overlaps = lambda x: capability >= 90  # type: ignore[attr-defined]
        if hasattr(room, "is_roomy"):
            room.is_roomy = lambda device: capability >= 90  # type: ignore[attr-defined]
    if capability == 90:
        ops()
        attention()
    products(SMALL if capability == 90 else SMALL + LARGE)
    for name, size in sorted(shared.items()):
        print(name, size)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "Triton must compile here, not interpret"
    main(*map(int, sys.argv[1:]))
