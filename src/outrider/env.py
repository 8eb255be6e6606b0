"""The only reader of os.environ. Every variable outrider looks at is listed here."""

from __future__ import annotations

import os
from pathlib import Path

RUNNER = "OUTRIDER_RUNNER"
"""Runner to use where the `runner` option is "auto"."""

API_KEY = "OUTRIDER_API_KEY"
"""Key that clients of `outrider serve` must send, beside those given by its options."""

CACHE = "OUTRIDER_CACHE_DIR"
"""Directory for what later starts read again; left out: outrider in XDG_CACHE_HOME, or in ~/.cache."""

PROCESS = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
"""What torchrun tells each of the processes it starts."""


def runner() -> str | None:
    """The runner named in the environment, if any."""
    return os.environ.get(RUNNER) or None


def api_key() -> str | None:
    """The server's API key named in the environment, if any; an empty one is one too, for the server to refuse."""
    return os.environ.get(API_KEY)


def cache_directory() -> Path:
    """Where outrider keeps what later starts read again."""
    base = os.environ.get(CACHE)
    if base:
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "outrider"


def of_one_thread() -> dict[str, str]:
    """The environment for a process that is one of several and should take one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def process() -> tuple[int, int, int]:
    """Rank, rank on this host, and number of processes, as torchrun sets them; (0, 0, 1) outside it."""
    return tuple(int(os.environ.get(name, default)) for name, default in PROCESS)  # type: ignore[return-value]
