"""Whose turn it is: threads that share an object take turns, and a forked process gets none."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class FairLock:
    """A re-entrant lock that threads get about in the order in which they ask: none waits for ever for another's loop.

    An interrupt (Ctrl-C) while a thread waits leaves it free.
    """

    def __init__(self) -> None:
        # Both re-entrant: a signal's handler may ask for a turn while its own thread waits for one.
        self.queue, self.thread_lock = threading.RLock(), threading.RLock()

    def acquire(self) -> None:
        """Waits for the lock. One thread at a time stands at it, the others in the queue before it."""
        if self.thread_lock._is_owned():  # type: ignore[attr-defined]
            self.thread_lock.acquire()
        else:
            with self.queue:
                self.thread_lock.acquire()

    def acquire_at_once(self) -> bool:
        """Takes the lock if no other thread has it; whether it did. Safe in a finalizer."""
        return self.thread_lock.acquire(blocking=False)

    def release(self) -> None:
        """Gives it back. RuntimeError if this thread does not have it."""
        self.thread_lock.release()


class _Shared(Protocol):
    @property
    def lock(self) -> FairLock: ...


S = TypeVar("S", bound=_Shared)


def in_turn(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that holds its object's `lock` while it runs."""

    @wraps(method)
    def call(self: S, /, *given: P.args, **named: P.kwargs) -> R:
        turns = self.lock
        lock = turns.thread_lock
        if lock._is_owned():  # type: ignore[attr-defined]
            return method(self, *given, **named)
        try:
            with turns.queue:
                lock.acquire()
            return method(self, *given, **named)
        finally:
            # An interrupt during the wait leaves nothing to give back. `suppress` would be a call before the release,
            # and Python looks for an interrupt at each call.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass

    return call


class _Forked(Protocol):
    def after_fork(self) -> None: ...


_alive: weakref.WeakSet[_Forked] = weakref.WeakSet()


def watch_forks(one: _Forked) -> None:
    """From now on `after_fork` of the object is called in each child that this process forks, before it runs on."""
    _alive.add(one)


def _after_fork() -> None:
    for one in list(_alive):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
