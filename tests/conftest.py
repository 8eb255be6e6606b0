"""Fixtures that several files share. Nothing here changes how outrider behaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints


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
