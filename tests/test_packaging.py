"""What is installed from a wheel is complete: the code, the bundled model, the prompts."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import outrider
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
