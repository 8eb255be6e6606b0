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


def test_an_edit_of_what_all_use_recompiles_all(tree: Path) -> None:
    assert compiled_by(tree) <= {"sample"}
    edited = tree / "outrider" / "kernels" / "cpu" / "jit.py"
    edited.write_text(edited.read_text() + "# a comment\n")
    assert compiled_by(tree) > OPS
