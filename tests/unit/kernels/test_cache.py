"""What is compiled again after an edit, and for another processor."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import outrider
from outrider.kernels.gpu.disk_cache import writable

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


ONE_OP = """
import torch
from outrider.kernels.scale_hidden import SCALE_HIDDEN

one, slots = torch.ones(2, 8), torch.tensor([0, 1])
print(SCALE_HIDDEN.on("cpu")(one, torch.full((2,), 2.0), slots, slots, False)[0].sum().item())
"""


def said_by(tree: Path, resource_limit: int | None = None, **environment: str) -> str:
    """What a process that runs an op says on stderr; it must come to the right result."""

    def limit() -> None:
        assert resource_limit is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource_limit, resource_limit))

    done = subprocess.run(
        [sys.executable, "-c", ONE_OP],
        env={**os.environ, "PYTHONPATH": str(tree), **environment},
        preexec_fn=None if resource_limit is None else limit,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == RIGHT
    return done.stderr


RIGHT = "8.0\n"
SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "halved": lambda written: written[: len(written) // 2],
    "empty": lambda written: b"",
    "garbage": lambda written: bytes(reversed(written)),
    "one-bit": lambda written: written[:-100] + bytes([written[-100] ^ 1]) + written[-99:],
}


@pytest.fixture(scope="module")
def warm(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one op in it."""
    made = tmp_path_factory.mktemp("warm")
    assert said_by(tree, NUMBA_CACHE_DIR=str(made)) == ""
    assert said_by(tree, NUMBA_CACHE_DIR=str(made)) == ""
    return made


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_damaged_cache_is_compiled_anew(tree: Path, warm: Path, tmp_path: Path, spoil: str, suffix: str) -> None:
    """One warning, the right result, and a whole cache afterwards."""
    cache = tmp_path / "cache"
    shutil.copytree(warm, cache)
    files = list(cache.rglob(f"*{suffix}"))
    assert files
    for file in files:
        file.write_bytes(SPOILS[spoil](file.read_bytes()))
    said = said_by(tree, NUMBA_CACHE_DIR=str(cache))
    assert said.count("\n") == 1 and str(cache) in said and "is damaged" in said and "set NUMBA_CACHE_DIR" in said
    assert said_by(tree, NUMBA_CACHE_DIR=str(cache)) == ""


def test_a_full_disk_costs_the_cache_only(tree: Path, tmp_path: Path) -> None:
    said = said_by(tree, resource_limit=64, NUMBA_CACHE_DIR=str(tmp_path))
    assert said.count("\n") == 1 and "cannot be kept in " + str(tmp_path) in said and "make room there" in said
    assert not list(tmp_path.rglob("*.tmp*")), "half a file was left"


def test_no_directory_that_can_be_written(tree: Path, tmp_path: Path) -> None:
    """As for a user without a home, on a read-only disk: files stand where the directories would be made."""
    shutil.copytree(tree / "outrider", tmp_path / "outrider", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path / "outrider").rglob("*"):
        if folder.is_dir():
            (folder / "__pycache__").write_text("")
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "nowhere")
    said = said_by(tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR=nowhere)
    assert said.count("\n") == 1 and "no directory for compiled kernels can be written" in said
    assert nowhere in said and "set NUMBA_CACHE_DIR to a directory that can" in said


def test_triton_has_a_directory_where_its_own_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert writable(str(tmp_path / "made")) == str(tmp_path / "made") and not caplog.records
    (tmp_path / "file").write_text("")
    made = writable(str(tmp_path / "file" / "cache"))
    assert os.access(made, os.W_OK) and not made.startswith(str(tmp_path))
    assert "file/cache cannot be written" in caplog.text and "set TRITON_CACHE_DIR" in caplog.text
    shutil.rmtree(made)


def test_an_edit_of_what_all_use_recompiles_all(tree: Path) -> None:
    assert compiled_by(tree) <= {"sample"}
    edited = tree / "outrider" / "kernels" / "cpu" / "jit.py"
    edited.write_text(edited.read_text() + "# a comment\n")
    assert compiled_by(tree) > OPS
