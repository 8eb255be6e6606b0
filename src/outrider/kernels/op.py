"""What every kernel file ends with: an `Op`, from which dispatch, the kernel tests and the microbenchmark come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from outrider.kernels.gpu.triton import AVAILABLE

Example = Mapping[str, Any]
"""Keyword arguments of one call; tensors are drawn with the generator and put on the device given."""


@dataclass(frozen=True)
class Op:
    """One operation: a reference that defines it, and kernels that must agree with it.

    `reference` runs wherever torch does. `kernels` maps a device type ("cpu", "cuda") to a
    faster function of the same signature; a device without one runs the reference, as does a GPU where
    Triton is not installed. Nothing is chosen by trying: an entry that cannot run is a bug.

    `examples(generator, device, wide)` yields arguments; `wide`: activations are float32 whatever the weights, as on
    a CPU, and not of their type, as on a GPU.
    """

    name: str
    reference: Callable[..., Any]
    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    examples: Callable[[torch.Generator, torch.device, bool], Iterable[Example]] | None = None
    outputs: tuple[str, ...] = ()  # arguments written in place, compared beside what is returned
    tolerance: float = 1e-5  # largest ||kernel - reference|| / ||reference|| in float32; rounding to less adds to it
    narrow: float = 5e-3  # the same where numbers are of 16 bits: two units in the last place, most by less
    why: str = ""  # the reason for a tolerance other than float32 rounding

    def on(self, device: torch.device | str) -> Callable[..., Any]:
        """The function that serves a device; resolve it once, outside the step."""
        kind = torch.device(device).type
        if kind == "cuda" and not AVAILABLE:
            return self.reference
        return self.kernels.get(kind, self.reference)
