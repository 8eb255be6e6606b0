"""A server for the scripts that load one: started for them, told to end, and its exit code kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

END_SECONDS = 90.0


@dataclass
class Served:
    """A server that listens."""

    url: str
    pid: int
    exit_code: int | None = None  # once it has ended


@contextmanager
def served(*flags: str) -> Iterator[Served]:
    """`outrider serve` with these flags on a free port; its log goes where our errors go."""
    process = subprocess.Popen(
        [sys.executable, "-m", "outrider", "serve", "--port", "0", "--json", *flags], stdout=subprocess.PIPE, text=True
    )
    server: Served | None = None
    try:
        assert process.stdout is not None
        server = Served(json.loads(process.stdout.readline())["url"], process.pid)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(END_SECONDS)
        if server is not None:
            server.exit_code = code
