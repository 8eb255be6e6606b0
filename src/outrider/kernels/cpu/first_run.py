"""The first run on a machine: CPU kernels that no cache holds yet are compiled by several processes at once.

numba compiles under a lock, so one process uses one core for it. Each process here imports the kernels' files, is given
one function after another, and leaves the machine code in numba's cache, from where the engine then loads it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from outrider import env
from outrider.kernels.cpu.jit import ENTRIES

logger = logging.getLogger("outrider")

SECONDS_EACH = 0.4
"""What a kernel takes to compile on a core of 2024, for the first estimate."""
SECONDS_TO_START = 2.0
"""What a process takes to import torch and numba."""
WORTH_A_PROCESS = 5
"""Kernels, below which another process is not worth its start."""
MAX_PROCESSES = 4
SECONDS_BETWEEN_REPORTS = 2.0

_CHILD = """
import gc, json, sys
gc.disable()
sys.path[:] = json.loads(sys.argv[1])
from outrider.kernels.cpu.first_run import compile_for_parent
compile_for_parent()
"""


def compile_missing(report: Callable[[str], None] | None = None) -> int:
    """Compiles what the imported files of kernels declare and the cache lacks. Returns how many that were.

    `report` takes lines for a person who waits. With one core nothing is compiled here: whoever calls a kernel first
    compiles it. The same holds for what a process fails to compile, so that the error comes up where it belongs.
    """
    missing = [name for name, entry in ENTRIES.items() if not entry.is_kept()]
    if not missing:
        return 0
    missing.sort(key=lambda name: -ENTRIES[name].size)  # the long ones first, so that none is left to the end
    processes = max(1, min(torch.get_num_threads(), MAX_PROCESSES, len(missing) // WORTH_A_PROCESS))
    say = report or _report()
    seconds = len(missing) * SECONDS_EACH / processes + (SECONDS_TO_START if processes > 1 else 0)
    how = f" in {processes} processes" if processes > 1 else ""
    say(f"compiling {len(missing)} CPU kernels{how}, once on this machine: about {seconds:.0f} s")
    if processes > 1:
        _compile_in(processes, missing, say)
    return len(missing)


def _report() -> Callable[[str], None]:
    """Lines on stderr for a person at a terminal, else in the log."""
    if sys.stderr is not None and sys.stderr.isatty():
        return lambda line: print(line, file=sys.stderr, flush=True)
    return logger.info


def _compile_in(processes: int, names: Sequence[str], say: Callable[[str], None]) -> None:
    left, done = deque(names), list[str]()
    start = time.monotonic()
    children: list[subprocess.Popen[str]] = []
    try:
        try:
            for _ in range(processes):
                children.append(_start())
        except OSError as error:
            logger.warning("cannot start a process that compiles kernels, so the engine compiles its part: %s", error)
        feeders = [threading.Thread(target=_feed, args=(child, left, done), daemon=True) for child in children]
        for feeder in feeders:
            feeder.start()
        first = reported = start
        while any(feeder.is_alive() for feeder in feeders):
            time.sleep(0.02)
            now = time.monotonic()
            first = first if done else now  # the pace is that of kernels, without the start of the processes
            if len(done) > processes and now - reported > SECONDS_BETWEEN_REPORTS:
                reported = now
                remaining = (now - first) / len(done) * (len(names) - len(done))
                say(f"compiled {len(done)} of {len(names)}; about {remaining:.0f} s to go")
    finally:
        for child in children:
            child.kill()
            child.wait()
    say(f"compiled {len(done)} of {len(names)} in {time.monotonic() - start:.0f} s")


def _start() -> subprocess.Popen[str]:
    # An error is not lost with its output: the engine meets it again when it compiles the same kernel.
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps([str(entry) for entry in sys.path])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env.of_one_thread(),
    )


def _feed(child: subprocess.Popen[str], left: deque[str], done: list[str]) -> None:
    """Gives a process one name after another, until none is left or it dies."""
    assert child.stdin is not None and child.stdout is not None
    while left:
        try:
            name = left.popleft()
            child.stdin.write(name + "\n")
            child.stdin.flush()
        except (IndexError, OSError):
            return
        if child.stdout.readline().strip() != name:
            return
        done.append(name)


def compile_for_parent() -> None:
    """What a process runs: names of kernels come in, each goes out again once its code is in the cache."""
    for line in sys.stdin:
        name = line.strip()
        import_module(name.partition(":")[0])
        ENTRIES[name].compile_alone()
        print(name, flush=True)
