"""What a part may need of the runner that hosts it, and what a runner offers.

Facts stand beside the code that has them: a part names its `needs`, a runner its `offer`, and
the oracle subtracts the two sets. No list of methods, models or devices exists anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto


class Feature(Enum):
    """One thing a part may ask of the runner that hosts it."""

    HOST_CODE = auto()  # plain Python between stages, with tensors readable on the host
    TOKEN_HISTORY = auto()  # all committed tokens of a row, on the device
    FEATURES = auto()  # the target's hidden states between layers, for each of a step's tokens
    DRAFT_CACHE = auto()  # key and value layers of the drafter's own, in the target's blocks
    DRAFT_LOGITS = auto()  # the drafter's own logits, kept from one step to the next
    CPU = auto()  # a machine without an accelerator
    CUDA = auto()  # an NVIDIA GPU
    WITHOUT_TRITON = auto()  # kernels in plain torch on a GPU, where Triton is not installed
    OLD_CUDA = auto()  # kernels in plain torch on a GPU below compute capability 8.0, for which Triton compiles none
    TENSOR = auto()  # the model's matrices split over ranks
    PIPELINE = auto()  # the model's layers split over ranks


DEVICES = frozenset({Feature.CPU, Feature.CUDA, Feature.WITHOUT_TRITON, Feature.OLD_CUDA})
"""What a device is, rather than what a part of the program makes use of."""


@dataclass(frozen=True, slots=True)
class Part:
    """Anything a configuration names that a runner has to host: a model, a drafter, the device itself."""

    name: str
    needs: frozenset[Feature] = frozenset()


@dataclass(frozen=True, slots=True)
class Gap:
    """Why a part cannot be hosted: printed as is, so it must read as a sentence."""

    part: str
    feature: Enum  # a `Feature`, or what layers may need of a backend
    reason: str

    def __str__(self) -> str:
        needs = "" if self.feature in DEVICES else f" needs {self.feature.name.lower()}"
        return f"{self.part}{needs}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a runner offers; `lacks` gives the reason, with its remedy, for each feature it does not."""

    has: frozenset[Feature]
    lacks: Mapping[Feature, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unexplained = set(Feature) - self.has - set(self.lacks)
        assert not unexplained, f"an offer must give a reason for each feature it lacks: {unexplained}"

    def gaps(self, part: Part) -> list[Gap]:
        """The part's needs that are not met, in a stable order."""
        missing = sorted(part.needs - self.has, key=lambda feature: feature.name)
        return [Gap(part.name, feature, self.lacks[feature]) for feature in missing]
