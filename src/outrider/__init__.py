"""outrider: an LLM inference engine built around speculative decoding.

What needs torch is imported when its name is first used, so that `import outrider` takes no time.
"""

from __future__ import annotations

import importlib
import typing

from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.errors import (
    CapacityError,
    CheckpointError,
    EngineBusyError,
    EngineClosedError,
    EngineDeadError,
    EngineForkedError,
    InputError,
    LogitsError,
    OptionError,
    OutriderError,
    PromptError,
    SamplingError,
    UnknownArchitectureError,
    UnsupportedError,
)

if typing.TYPE_CHECKING:
    from outrider.draft.base import DraftContext, Drafter, DraftOptions
    from outrider.draft.host import HostDrafter
    from outrider.engine.llm import LLM
    from outrider.engine.outputs import CompletionOutput, Piece, RequestOutput
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
    "EngineBusyError",
    "EngineClosedError",
    "EngineDeadError",
    "EngineForkedError",
    "HostDrafter",
    "InputError",
    "LogitsError",
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

_IMPORTED_LATE = {
    "LLM": "outrider.engine.llm",
    "CompletionOutput": "outrider.engine.outputs",
    "DraftContext": "outrider.draft.base",
    "DraftOptions": "outrider.draft.base",
    "Drafter": "outrider.draft.base",
    "HostDrafter": "outrider.draft.host",
    "LogitsProcessor": "outrider.verify.base",
    "Piece": "outrider.engine.outputs",
    "RequestOutput": "outrider.engine.outputs",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _IMPORTED_LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_IMPORTED_LATE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
