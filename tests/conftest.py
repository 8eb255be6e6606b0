"""Fixtures that several files share. Nothing here changes how outrider behaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints

SERVING = ("fastapi", "httpx", "msgspec", "openai", "prometheus_client", "uvicorn", "zmq")
LACKING = [name for name in SERVING if find_spec(name) is None]
NEED_SERVING = ("test_server*.py", "test_*_api.py", "test_playground.py", "test_serving*.py", "test_manners.py")
collect_ignore_glob = [*NEED_SERVING, "unit/server/*", "unit/engine/test_engine_process.py"] if LACKING else []


def pytest_report_header() -> list[str]:
    """A machine that runs the `gpu` tests need not be able to serve."""
    return [f"the server's tests are left out: {', '.join(LACKING)} not installed"] if LACKING else []


def pytest_configure() -> None:
    """Workers of pytest-xdist share the cores: two teams of threads on the same ones wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **config)`: the directory of such a checkpoint with a tokenizer, written once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen3", **config: Any) -> Path:
        key = repr((family, sorted(config.items())))
        if key not in made:
            made[key] = checkpoints.write(tmp_path_factory.mktemp(family), family, **config)
            checkpoints.write_tokenizer(made[key])
        return made[key]

    return make
