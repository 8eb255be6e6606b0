"""Real servers for the suite: `outrider serve` in a process, on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

SRC = Path(__file__).parent.parent / "src"
START_SECONDS = 120.0


class Server:
    """A running server, its log and the processes behind it."""

    def __init__(self, process: subprocess.Popen[str], log: Path, url: str, model: str) -> None:
        self.process, self.log, self.url, self.model = process, log, url, model
        self.http = httpx.Client(base_url=url, timeout=60.0)

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return engine

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A JSON request."""
        return self.http.post(path, json=body)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels, but for the model's name, which all have."""
        found = {}
        for line in self.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.replace(f'model_name="{self.model}"', "")
                name = name.replace("{}", "").replace("{,", "{").replace(",}", "}")
                found[name] = float(value)
        return found

    def until(self, name: str, value: float, seconds: float = 10.0) -> None:
        """Waits for a metric to have a value."""
        end = time.monotonic() + seconds
        while (now := self.metrics()[name]) != value:
            assert time.monotonic() < end, f"{name} is {now}, not {value}, after {seconds} seconds"
            time.sleep(0.02)

    def exit_code(self, seconds: float = 20.0) -> int:
        """Waits for the end."""
        return self.process.wait(seconds)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events; the last must be [DONE], or an error."""
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: "), line
            if line == "data: [DONE]":
                return
            content = json.loads(line.removeprefix("data: "))
            yield content
            if "error" in content:
                return
    raise AssertionError("the stream ended without [DONE]")


@contextmanager
def serving(log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server with these arguments; it must end when told to, unless the test has ended it."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "outrider", "serve", *arguments, "--port", "0", "--json"],
            env={**os.environ, "PYTHONPATH": str(SRC), **environment},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server did not start: {log.read_text()}"
        told = json.loads(line)
        yield Server(process, log, told["url"], told["model"])
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
