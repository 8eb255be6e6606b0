"""What is compiled again after an edit, and for another processor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import outrider

PACKAGE = Path(outrider.__file__).parent
COMPILED = """
import json, sys, torch
from numba.core import event

compiled = set()

class Listener(event.Listener):
    def on_start(self, found):
        compiled.add(found.data["dispatcher"].py_func.__module__)

    def on_end(self, found):
        pass

event.register("numba:compile", Listener())
from outrider.kernels.scale_hidden import SCALE_HIDDEN
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.kernels.activation import SILU_MUL

one, slots = torch.ones(2, 8), torch.tensor([0, 1])
SILU_MUL.on("cpu")(one)
SCALE_HIDDEN.on("cpu")(one, torch.ones(2), slots, slots, False)
GUMBEL_ARGMAX.on("cpu")(one, torch.ones(2), slots, slots, 1)
print(json.dumps(sorted(name for name in compiled if name.startswith("outrider"))))
"""
OPS = {"activation", "sample", "scale_hidden"}


def compiled_by(tree: Path) -> set[str]:
    """The files of kernels that were compiled and not taken from the cache."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(tree / "cache")}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True, capture_output=True, text=True)
    return set(re.findall(r"outrider\.kernels\.cpu\.(\w+)", done.stdout))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose kernels are compiled."""
    made = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "bundled")
    shutil.copytree(PACKAGE, made / "outrider", ignore=ignored)
    assert compiled_by(made) > OPS
    return made


def test_a_comment_recompiles_its_own_file_and_no_other(tree: Path) -> None:
    assert compiled_by(tree) == set()
    edited = tree / "outrider" / "kernels" / "cpu" / "sample.py"
    edited.write_text(edited.read_text() + "# a comment\n")
    assert compiled_by(tree) == {"sample"}
    os.utime(edited)
    assert compiled_by(tree) == set(), "the time of a file does not matter, what it says does"


FIRST_CALLS = """
import threading, torch
from outrider.kernels.activation import SILU_MUL
from outrider.kernels.norm import RMS_NORM

silu_mul, rms_norm, x, failed = SILU_MUL.on("cpu"), RMS_NORM.on("cpu"), torch.ones(512, 512), []
start = threading.Barrier(8)

def call(index):
    start.wait()
    found = silu_mul(x) if index % 2 else rms_norm(x, x[0], 1e-6)
    if not found.isfinite().all():
        failed.append(index)

threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed
"""


@pytest.mark.parametrize("cold", [True, False])
def test_several_threads_may_call_a_kernel_for_the_first_time(tree: Path, tmp_path: Path, cold: bool) -> None:
    """A task that is called before it is there would take the process down."""
    cache = tmp_path if cold else tree / "cache"
    environment = {**os.environ, "PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, check=True, timeout=120)


def test_an_edit_of_what_all_use_recompiles_all(tree: Path) -> None:
    assert compiled_by(tree) <= {"sample"}
    edited = tree / "outrider" / "kernels" / "cpu" / "jit.py"
    edited.write_text(edited.read_text() + "# a comment\n")
    assert compiled_by(tree) > OPS
