"""One exception tree, so that a caller can catch exactly as much as it means to.

    OutriderError
    +-- InputError (ValueError)      what one request asked for; other requests go on
    |   +-- PromptError              empty, too long, token ids out of range
    |   +-- SamplingError            a sampling value or a contradiction between two
    |   +-- FieldError               a field of a request to the server: unknown, of the wrong type, not offered
    |   +-- DataError                a line of training data, with its file and number
    +-- OptionError (ValueError)     what the engine was asked to be
    |   +-- UnsupportedError         no runner serves the configuration; holds every reason
    +-- CheckpointError (ValueError) a file that is missing, truncated, or not what it should be
    |   +-- UnknownArchitectureError a config.json naming a model this engine does not have
    +-- CapacityError (RuntimeError) the memory given cannot hold one sequence
    +-- LogitsError (RuntimeError)   one request's logits hold no token to draw; other requests go on
    +-- EngineDeadError (RuntimeError) the engine failed earlier and cannot go on
    |   +-- EngineRestartingError    the server is starting another one; later it will go
    |   +-- EngineClosedError        it was closed
    |   +-- EngineForkedError        it belongs to the process that this one was forked from
    +-- EngineBusyError (RuntimeError) called from inside one of its own steps
    +-- OverloadError (RuntimeError) more is waiting than the server takes; later it will go
    +-- DeadlineError (RuntimeError) a request took longer than it may

Messages are lower case, name the value, and end with the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OutriderError(Exception):
    """The root of everything outrider raises on purpose."""


class InputError(OutriderError, ValueError):
    """One request is wrong; the engine and all other requests are unharmed."""

    def __init__(self, message: str = "", field: str | None = None) -> None:
        """`field`: what of the request is at fault, where it is one thing."""
        super().__init__(message)
        self.field = field


class PromptError(InputError):
    """A prompt that cannot be run."""


class SamplingError(InputError):
    """A sampling value out of its range, or two that contradict each other."""


class FieldError(InputError):
    """A request to the server names a field that is unknown, not offered, or of the wrong type."""


class DataError(InputError):
    """Training data that cannot be read or used; the message starts with file and line."""


class OptionError(OutriderError, ValueError):
    """An engine option that is unknown, out of range, or contradicts another."""


class UnsupportedError(OptionError):
    """No runner serves the configuration. The message holds every runner's reasons."""


class CheckpointError(OutriderError, ValueError):
    """A checkpoint file is missing, truncated, or does not hold what its config promises."""


class UnknownArchitectureError(CheckpointError):
    """The checkpoint's config names an architecture this engine does not implement."""


class CapacityError(OutriderError, RuntimeError):
    """The memory given to the key/value cache cannot hold what is asked."""


class LogitsError(OutriderError, RuntimeError):
    """No token can be drawn from a request's logits: they hold NaN, +inf, or nothing but -inf."""


class EngineDeadError(OutriderError, RuntimeError):
    """The engine failed earlier; its cause is chained. Build a new one."""


class EngineRestartingError(EngineDeadError):
    """The engine failed and another is being started. `retry_after`: seconds until it is worth asking again."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(EngineDeadError):
    """`close` was called, or a `with` block has ended. Build a new one."""

    def __init__(
        self, message: str = "the engine was closed, by close() or the end of its with block: build a new one"
    ):
        super().__init__(message)


class EngineForkedError(EngineDeadError):
    """The engine was built before this process was forked: its threads and its device stay with the parent."""

    def __init__(
        self,
        message: str = "the engine was built before this process was forked, and belongs to the parent: build the LLM "
        "in the child, or start children with multiprocessing's method spawn",
    ) -> None:
        super().__init__(message)


class EngineBusyError(OutriderError, RuntimeError):
    """The engine was called from inside one of its own steps, as by a logits processor or a signal's handler."""

    def __init__(
        self,
        message: str = "the engine is in the middle of a step of this very thread: call it after the step, or from "
        "another thread",
    ) -> None:
        super().__init__(message)


class DeadlineError(OutriderError, RuntimeError):
    """A request to the server took longer than the server, or the request itself, allows."""


class OverloadError(OutriderError, RuntimeError):
    """As many requests wait as may. `retry_after`: seconds until it is worth asking again."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def class_name(error: BaseException) -> str:
    """The name of the class of this module that an exception is, for another process; others are EngineDeadError."""
    return next(
        (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__), EngineDeadError.__name__
    )


def rebuilt(name: str, message: str, field: str | None = None) -> OutriderError:
    """The exception of another process, from the name that `class_name` gave it."""
    kind = globals()[name]
    error: OutriderError = kind(message, field) if issubclass(kind, InputError) else kind(message)
    return error


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def shortened(text: str) -> str:
    """A value for a message: what a caller gives may be of any length."""
    return text if len(text) <= 80 else f"{text[:77]}..."
