"""What is installed from a wheel is complete: the code, the bundled model, the prompts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import outrider
from conftest import NEEDS
from outrider.load.hub import BUNDLED

ROOT = Path(__file__).parent.parent
MOST_BUNDLED = 40 << 20
"""Bytes of bundled checkpoints and prompts that an install may carry."""


def test_wheel_holds_the_package_and_the_bundled_model(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "outrider"
    files = {f"outrider/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= packed
    assert "outrider/bundled/model/model.safetensors" in packed


def test_bundled_checkpoints_stay_within_their_budget() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= MOST_BUNDLED


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == outrider.__version__
    assert f"## {outrider.__version__}" in (ROOT / "CHANGELOG.md").read_text()


BROUGHT_BY = {"zmq": "pyzmq", "pydantic_core": "pydantic"}
"""Modules whose package has another name."""
OPTIONAL = {"triton", "opentelemetry"}
"""Modules that are imported only where they are installed."""


def test_what_is_imported_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=; ]", package)[0].replace("-", "_") for package in declared}
    nodes = [node for path in (ROOT / "src").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    modules = {name.split(".")[0] for name in found} - sys.stdlib_module_names - OPTIONAL - {"outrider"}
    assert {BROUGHT_BY.get(name, name) for name in modules} - names == set()
    assert {"torch", "llvmlite", "starlette"} <= modules, "the check sees too little"


HELPERS = {"servers": {"httpx"}, "fake_engine": {"msgspec", "uvicorn"}}
"""What files beside the tests import."""


def imported(path: Path) -> set[str]:
    """The modules that a file needs to be loaded."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found | {each for name in found for each in HELPERS.get(name, ())}


def test_every_test_that_needs_an_extra_says_so() -> None:
    """Else a machine without it, as `make gpu` may meet, ends with an error of collection."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ours = {re.split(r"[\[<>=; ]", package)[0].replace("-", "_") for each in extras.values() for package in each}
    serving = {"fastapi", "httptools", "msgspec", "prometheus_client", "uvicorn", "uvloop", "zmq"}
    optional = (ours | serving | {"opentelemetry"}) - {
        "outrider",
        "pytest",
        "filelock",
        "httpx",
    }  # huggingface_hub brings both
    tests = ROOT / "tests"
    wanting = {}
    for path in tests.rglob("test_*.py"):
        given = {
            need.split(".")[0] for files, needs in NEEDS.items() if path in set(tests.glob(files)) for need in needs
        }
        if lacking := {name.split(".")[0] for name in imported(path)} & optional - given:
            wanting[str(path.relative_to(tests))] = sorted(lacking)
    assert not wanting
    assert all(any(tests.glob(files)) for files in NEEDS), "a pattern that no file has"
