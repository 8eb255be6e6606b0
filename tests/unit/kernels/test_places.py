"""Where an op's three versions lie, and that a contract alone loads neither numba nor Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import outrider.kernels
from outrider.bench.kernels import all_ops
from outrider.kernels.op import FOLDERS

ROOT = Path(outrider.kernels.__file__).parent
PLUMBING = {
    ".": {"layer_by_ops", "op", "records"},
    "cpu": {
        *("addresses", "amx", "attention_tasks", "attention_tiles"),
        *("disk_cache", "emit", "first_run", "jit", "layer_phases", "layer_stack", "threads"),
    },
    "gpu": {"attention_shares", "attention_steps", "disk_cache", "partial_norm", "triton", "warmup"},
}
"""Files of a folder that are no op's."""


def files(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"} - PLUMBING[folder]


def test_every_contract_has_an_op() -> None:
    assert files(".") == {op.file for op in all_ops()}


@pytest.mark.parametrize("device", FOLDERS)
def test_an_op_has_a_kernel_exactly_where_it_says(device: str) -> None:
    declared = [op for op in all_ops() if device in op.kernels]
    assert files(FOLDERS[device]) == {op.file for op in declared}
    for op in declared:
        assert callable(op.kernel(device))
    for op in all_ops():
        undeclared = device not in op.kernels and op.file in files(FOLDERS[device])
        assert not (undeclared and hasattr(op.module(device), f"{op.name}_{FOLDERS[device]}")), op.name


def test_names_have_no_underscore_and_plumbing_is_there() -> None:
    for folder, names in PLUMBING.items():
        assert names <= {path.stem for path in (ROOT / folder).glob("*.py")}
        assert not [path for path in (ROOT / folder).glob("_*.py") if path.stem != "__init__"]


HEAVY = ("numba", "llvmlite", "triton")


def loaded_by(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_a_contract_loads_no_compiler() -> None:
    contracts = "\n".join(f"import outrider.kernels.{name}" for name in sorted(files(".")))
    assert loaded_by(contracts) == set()


def test_the_check_of_what_is_loaded_can_fail() -> None:
    statement = "from outrider.kernels.activation import SILU_MUL\nSILU_MUL.on('cpu')"
    assert loaded_by(statement) == {"numba", "llvmlite"}
