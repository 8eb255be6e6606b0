"""outrider: an LLM inference engine built around speculative decoding."""

from __future__ import annotations

from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.draft.base import DraftContext, Drafter, DraftOptions
from outrider.draft.host import HostDrafter
from outrider.engine.llm import LLM
from outrider.engine.outputs import CompletionOutput, Piece, RequestOutput
from outrider.errors import (
    CapacityError,
    CheckpointError,
    EngineDeadError,
    InputError,
    OptionError,
    OutriderError,
    PromptError,
    SamplingError,
    UnknownArchitectureError,
    UnsupportedError,
)
from outrider.verify.base import LogitsProcessor

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AcceptanceReport",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "DraftContext",
    "DraftOptions",
    "Drafter",
    "EngineDeadError",
    "HostDrafter",
    "InputError",
    "LogitsProcessor",
    "OptionError",
    "OutriderError",
    "Piece",
    "PromptError",
    "RequestOutput",
    "SamplingError",
    "SamplingParams",
    "UnknownArchitectureError",
    "UnsupportedError",
]
