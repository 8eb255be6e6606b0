"""Kernels that no cache holds are compiled by several processes, and then run as any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import outrider

SCRIPT = """
import json, sys, torch
from numba.core import event

compiled = []

class Listener(event.Listener):
    def on_start(self, found):
        compiled.append(found.data["dispatcher"].py_func.__module__)

    def on_end(self, found):
        pass

event.register("numba:compile", Listener())
from outrider.kernels.activation import SILU_MUL
from outrider.kernels.cpu import first_run, jit
from outrider.kernels.gather_rows import GATHER_ROWS

kernels = [op.on("cpu") for op in (SILU_MUL, GATHER_ROWS)]
for name in [name for name in jit.ENTRIES if not name.startswith(tuple(json.loads(sys.argv[1])))]:
    del jit.ENTRIES[name]
torch.set_num_threads(2)
first_run.WORTH_A_PROCESS = 1
{before}
lines = []
count = first_run.compile_missing(lines.append)
kept = sorted(name.partition("cpu.")[2] for name, entry in jit.ENTRIES.items() if entry.is_kept())
here = [name for name in compiled if name.startswith("outrider")]
x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
same = torch.allclose(SILU_MUL.on("cpu")(x), SILU_MUL.reference(x), atol=1e-6)
print(json.dumps({"count": count, "kept": kept, "here": here, "lines": lines, "same": same}))
"""
FILES = ["outrider.kernels.cpu.activation", "outrider.kernels.cpu.gather_rows"]
OF_THEM = ["activation:_gate_kernel", "activation:gate_rows", "gather_rows:_gather_kernel"]


def first_run(cache: Path, before: str = "", files: list[str] = FILES) -> dict[str, Any]:
    code = SCRIPT.replace("{before}", before)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(outrider.__file__).parent.parent),
        "NUMBA_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-c", code, json.dumps(files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numba")


def test_other_processes_compile_them_once(cache: Path) -> None:
    found = first_run(cache)
    assert found["count"] == 3 and found["kept"] == OF_THEM
    assert found["here"] == [], "compiled in the calling process too"
    assert found["same"], "a kernel whose task was left out while it was compiled"
    assert found["lines"][0].startswith("compiling 3 CPU kernels in 2 processes, once on this machine: about ")
    assert found["lines"][-1].startswith("compiled 3 of 3 in ")
    again = first_run(cache)
    assert again["count"] == 0 and again["lines"] == [] and again["here"] == [] and again["same"]


def test_with_one_thread_the_first_caller_compiles(tmp_path: Path) -> None:
    found = first_run(tmp_path, "torch.set_num_threads(1)", FILES[:1])
    assert found["count"] == 2 and found["kept"] == [] and found["same"]
    (line,) = found["lines"]
    assert "compiling 2 CPU kernels, once on this machine" in line


@pytest.mark.parametrize("executable", ["/no/such/python", ""])
def test_processes_that_cannot_be_started_leave_the_work_to_the_engine(executable: str, tmp_path: Path) -> None:
    found = first_run(tmp_path, f"sys.executable = {executable!r}", FILES[:1])
    assert found["kept"] == [] and found["same"]
    assert found["lines"][-1].startswith("compiled 0 of 2 in ")


def test_processes_that_die_leave_the_work_to_the_engine(tmp_path: Path) -> None:
    found = first_run(tmp_path, "first_run._CHILD = 'raise SystemExit(1)'", FILES[:1])
    assert found["kept"] == [] and found["same"]
    assert found["lines"][-1].startswith("compiled 0 of 2 in ")
