"""What every kernel file ends with: an `Op`, from which dispatch, the kernel tests and the microbenchmark come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Example = Mapping[str, Any]
"""Keyword arguments of one call; tensors are drawn with the generator and put on the device given."""


@dataclass(frozen=True)
class Op:
    """One operation: a reference that defines it, and kernels that must agree with it.

    `reference` runs wherever torch does. `kernels` maps a device type ("cpu", "cuda") to a
    faster function of the same signature; a device without one runs the reference. Nothing is
    chosen by trying: an entry that cannot run is a bug.
    """

    name: str
    reference: Callable[..., Any]
    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    examples: Callable[[torch.Generator, torch.device], Iterable[Example]] | None = None
    outputs: tuple[str, ...] = ()  # arguments written in place, compared beside what is returned
    tolerance: float = 1e-5  # largest ||kernel - reference|| / ||reference|| in float32
    why: str = ""  # the reason for a tolerance other than float32 rounding

    def on(self, device: torch.device | str) -> Callable[..., Any]:
        """The function that serves a device; resolve it once, outside the step."""
        return self.kernels.get(torch.device(device).type, self.reference)
