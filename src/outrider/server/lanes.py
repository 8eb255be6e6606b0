"""Threads for what a request costs before it runs: large ones wait for each other, and small ones for none of them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from outrider.errors import OverloadError

Made = TypeVar("Made")

SMALL = 16 << 10
"""Bytes of a request, or characters of a prompt, up to which its work takes milliseconds."""

LARGE = 256 << 10
"""Bytes or characters from which it may take a second."""

TRIM_SECONDS = 1.0
"""After the last large work, before its memory is given back to the system."""

RETRY_SECONDS = 2
"""Before a request is worth sending again when too many like it wait."""


class Lane:
    """A thread that does one thing after another."""

    def __init__(self, name: str, max_waiting: int, *, is_large: bool = False, is_background: bool = False) -> None:
        """`is_large`: its work leaves much memory free. `is_background`: other threads go first."""
        self._executor = ThreadPoolExecutor(1, name, _yield_to_others if is_background else None)
        self._max_waiting, self._is_large = max_waiting, is_large
        self._num_waiting = 0
        self._closed = False

    async def run(self, work: Callable[[], Made]) -> Made:
        """What the work gives. Work whose caller is cancelled is dropped if it has not begun.

        Raises OverloadError if too much waits.
        """
        if self._num_waiting >= self._max_waiting:
            raise OverloadError(
                f"{self._num_waiting} other large requests wait to be read: try again later", RETRY_SECONDS
            )
        self._num_waiting += 1
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, work)
        finally:
            self._num_waiting -= 1
            if self._is_large and not self._num_waiting:
                loop.call_later(TRIM_SECONDS, self._give_memory_back)

    def _give_memory_back(self) -> None:
        if not self._num_waiting and not self._closed:
            self._executor.submit(give_memory_back)

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)


class Lanes:
    """Where the work of requests is done, by its size."""

    def __init__(self) -> None:
        self.reading = Lane("outrider-read", 64, is_large=True)
        """For Python code over a large body. It holds Python's lock, so there is one such thread."""
        self._small = Lane("outrider-encode", sys.maxsize)
        self._medium = Lane("outrider-encode-medium", 64, is_large=True)
        self._large = Lane("outrider-encode-large", 16, is_large=True, is_background=True)

    def encoding(self, num_characters: int) -> Lane:
        """For encoding so much text."""
        if num_characters <= SMALL:
            return self._small
        return self._medium if num_characters <= LARGE else self._large

    def close(self) -> None:
        """Ends the threads."""
        for lane in (self.reading, self._small, self._medium, self._large):
            lane.close()


def _yield_to_others() -> None:
    """Lowers the priority of this thread alone, where the system has one for each."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def give_memory_back() -> None:
    """Gives free memory back to the system, where the C library keeps it otherwise: glibc does, for each thread.

    A prompt of 4 MB needs some hundred megabytes while it is encoded, in pieces so small that glibc keeps them all.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
