"""How long a request may take: as the server says, or less if the request asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from outrider.errors import DeadlineError, FieldError

HEADER = "X-Request-Timeout"
"""The header in which a request says how many seconds it may take."""


def seconds_asked(given: str | None, limit: float | None) -> float | None:
    """Seconds for a request with this header, on a server that gives `limit`; None: as long as it takes.

    FieldError for what is no time, or is more than the server gives.
    """
    if given is None:
        return limit
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise FieldError(f"{HEADER} must be a number of seconds above 0: {given[:80]!r}", HEADER)
    if limit is not None and seconds > limit:
        raise FieldError(f"{HEADER} {seconds:g} is more than the {limit:g} seconds this server gives a request", HEADER)
    return seconds


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a request must have ended."""

    seconds: float  # that it was given
    at: float  # by the clock of the event loop
    passed: Callable[[], None]  # called if it had not ended by then

    @classmethod
    def after(cls, seconds: float, passed: Callable[[], None]) -> Deadline:
        """One so many seconds from now."""
        return cls(seconds, asyncio.get_running_loop().time() + seconds, passed)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Cancels what is done within at the deadline, and raises DeadlineError."""
        try:
            async with asyncio.timeout_at(self.at) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            self.passed()
            raise DeadlineError(
                f"the request was not finished within its {self.seconds:g} seconds: ask for less at once"
            ) from None
