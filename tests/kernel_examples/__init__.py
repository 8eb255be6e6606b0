"""Arguments with which kernels are compared with their references, found by the op's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kernel_examples import layers, sampling, steps
from outrider.kernels.op import Op

Example = Mapping[str, Any]
"""Keyword arguments of one call."""


def examples(op: Op[..., Any], generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    """Tensors are drawn with the generator and put on the device.

    `wide`: activations are float32 whatever the weights, as on a CPU, and not of their type, as on a GPU.
    """
    found = [getattr(room, op.name) for room in (layers, sampling, steps) if hasattr(room, op.name)]
    assert len(found) == 1, f"{len(found)} sets of examples for {op.name}"
    made: Iterable[Example] = found[0](generator, device, wide)
    return made
