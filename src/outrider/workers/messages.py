"""What an engine and its worker's process send each other, pickled, besides `StepPlan` and `StepResult`."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from enum import Enum
from typing import Any

from outrider.errors import InputError, class_name
from outrider.parallel.mesh import Mesh
from outrider.runner.base import Runner, RunnerConfig


@dataclass(frozen=True, slots=True)
class Build:
    """The first message: build this runner."""

    runner: type[Runner]
    config: RunnerConfig  # without callbacks
    mesh: Mesh
    num_threads: int  # as `torch.set_num_threads` takes it
    log_level: int


class Call(Enum):
    """What a worker is asked besides running plans."""

    RESET = "reset"
    STATS = "stats"


@dataclass(frozen=True, slots=True)
class Ask:
    """A call, numbered: after an interrupt, the reply to an earlier one may still come."""

    number: int
    call: Call


@dataclass(frozen=True, slots=True)
class Quit:
    """Close the runner and end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far building is: bytes of weights loaded, or programs recorded."""

    what: str  # "progress" or "recording", as in RunnerConfig
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Built:
    """The runner is ready."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an `Ask`."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The runner raised. The process runs no more plans."""

    error: str  # name of the class in `outrider.errors`
    message: str
    traceback: str
    field: str | None = None  # of an InputError

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """The message for an exception."""
        field = error.field if isinstance(error, InputError) else None
        said = "".join(traceback.format_exception(error))
        return cls(class_name(error), str(error) or repr(error), said, field)
