"""Rotary position embedding (Su et al., 2021) as a table, with the scalings that configs name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.errors import CheckpointError, nearest


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of a config; KeyError if it is missing and has no default, CheckpointError if it is something else."""
    value = config[key] if default is None else config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"config.json: {key} must be a number: {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule: low frequencies are divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def scale(self, frequency: Tensor) -> Tensor:
        wavelength = 2 * math.pi / frequency
        rotations = self.original_max_position_embeddings / wavelength
        kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., 2023)."""

    factor: float

    def scale(self, frequency: Tensor) -> Tensor:
        return frequency / self.factor


SCALINGS: dict[str, type[Llama3Scaling] | type[LinearScaling] | None] = {
    "default": None,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
}


@dataclass(frozen=True, slots=True)
class Rope:
    """What a config says of rotary embedding."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """Reads both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`."""
        said = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(said, Mapping):
            raise CheckpointError(f"config.json: rope parameters must be an object: {said!r}")
        given = dict(said)
        theta = number({**config, **given}, "rope_theta", 10_000.0)
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in SCALINGS:
            raise CheckpointError(f"rope scaling is not supported: {kind} ({nearest(kind, SCALINGS)})")
        scaling = SCALINGS[kind]
        if scaling is None:
            return cls(theta)
        try:
            return cls(theta, scaling(**{name: number(given, name) for name in scaling.__dataclass_fields__}))
        except KeyError as missing:
            raise CheckpointError(f"config.json: rope scaling {kind} lacks {missing}") from None

    def table(self, max_len: int, head_dim: int, device: torch.device) -> Tensor:
        """[max_len, D] float32: the cosines of D/2 frequencies, then their sines."""
        frequency = self.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.scaling is not None:
            frequency = self.scaling.scale(frequency)
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), frequency)
        return torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
