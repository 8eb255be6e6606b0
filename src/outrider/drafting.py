"""What the author of a drafter imports: the contract, its records, and where weights and caches come from."""

from __future__ import annotations

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature
from outrider.core.option import option
from outrider.core.sizes import Sizes
from outrider.draft.base import (
    AcceptancePattern,
    DraftContext,
    Drafter,
    DraftOptions,
    Footprint,
    Match,
    Mismatch,
    TargetFacts,
    TargetParts,
)
from outrider.draft.host import HostDrafter
from outrider.errors import CheckpointError, OptionError
from outrider.layers.weight import TensorSlot
from outrider.load.checkpoint import Checkpoint, TensorInfo, load_weights
from outrider.tensors import Draft, PagedRows, Purpose, Slots, StepBatch, TargetOutput

__all__ = [
    "AcceptancePattern",
    "CacheLayout",
    "Checkpoint",
    "CheckpointError",
    "Draft",
    "DraftContext",
    "DraftOptions",
    "Drafter",
    "Feature",
    "Footprint",
    "HostDrafter",
    "LayerCache",
    "Match",
    "Mismatch",
    "OptionError",
    "PagedRows",
    "Purpose",
    "Sizes",
    "Slots",
    "StepBatch",
    "TargetFacts",
    "TargetOutput",
    "TargetParts",
    "TensorInfo",
    "TensorSlot",
    "load_weights",
    "option",
]
