"""How ranks share a model, as a value that is passed around rather than looked up."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.capability import Feature, Part
from outrider.errors import OptionError


@dataclass(frozen=True, slots=True)
class Mesh:
    """`tensor` ranks split each matrix, `pipeline` ranks split the layers; this process is `rank`."""

    tensor: int = 1
    pipeline: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}_parallel_size must be 1 or more: {getattr(self, name)}")

    def parts(self) -> list[Part]:
        """What splitting asks of a runner."""
        split = []
        if self.tensor > 1:
            split.append(Part(f"tensor_parallel_size={self.tensor}", frozenset({Feature.TENSOR})))
        if self.pipeline > 1:
            split.append(Part(f"pipeline_parallel_size={self.pipeline}", frozenset({Feature.PIPELINE})))
        return split
