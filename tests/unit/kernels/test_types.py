"""mypy checks the calls of an op's kernel against the op's reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import outrider

SNIPPET = """
from torch import Tensor
from outrider.kernels.attention import PAGED_ATTENTION
from outrider.tensors import PagedRows

def right(query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> Tensor:
    return PAGED_ATTENTION.on("cpu")(query, keys, values, rows, scale=0.125)

PAGED_ATTENTION.on("cpu")("nonsense", 1, 2)

def wrong(query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> int:
    return PAGED_ATTENTION.on("cpu")(query, keys, values, rows, 0.125)
"""
REFUSED = {9, 12}
"""Lines: the nonsense, and a result of another type."""


def test_mypy_refuses_wrong_calls_and_no_right_one(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    source = Path(outrider.__file__).parent.parent
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", source.parent / "pyproject.toml", snippet]
    done = subprocess.run(
        command, env={**os.environ, "MYPYPATH": str(source)}, cwd=source.parent, capture_output=True, text=True
    )
    lines = [line.split(":") for line in done.stdout.splitlines() if "error:" in line]
    assert {Path(line[0]).name for line in lines} == {"snippet.py"}, done.stdout + done.stderr
    assert {int(line[1]) for line in lines} == REFUSED, done.stdout
