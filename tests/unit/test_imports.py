"""What is not imported until it is needed: help, versions and `import outrider` are there at once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

import outrider
from outrider.options import EngineOptions
from outrider.verify.registry import VERIFIERS

HEAVY = ("torch", "numba", "llvmlite", "numpy", "triton", "transformers", "tokenizers", "huggingface_hub", "fastapi")
COMMANDS = (
    ["--version"],
    ["--help"],
    *([name, "--help"] for name in ("serve", "generate", "explain", "accept", "train", "doctor", "bench")),
    *(["bench", name, "--help"] for name in ("latency", "throughput", "prefill", "kernels")),
)
IN_TURN = """
import contextlib, io, json, sys
from outrider.cli.main import main
found = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["outrider", *command]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main()
    found[" ".join(command)] = [shown.getvalue()[:400], [name for name in HEAVY if name in sys.modules]]
print(json.dumps(found))
"""


def imported(code: str, *arguments: str) -> str:
    whole = f"HEAVY = {HEAVY!r}\n{code}"
    return subprocess.run([sys.executable, "-c", whole, *arguments], capture_output=True, text=True, check=True).stdout


def heavy_after(code: str) -> list[str]:
    found: list[str] = json.loads(
        imported(f"{code}\nimport json, sys\nprint(json.dumps([n for n in HEAVY if n in sys.modules]))")
    )
    return found


def test_help_and_version_import_nothing_heavy() -> None:
    found = json.loads(imported(IN_TURN, json.dumps(COMMANDS)))
    assert {command: heavy for command, (_, heavy) in found.items() if heavy} == {}
    for command, (shown, _) in found.items():
        assert (outrider.__version__ if command == "--version" else "Usage:") in shown, f"{command} printed {shown!r}"


def test_importing_outrider_imports_nothing_heavy() -> None:
    assert heavy_after("import outrider; outrider.SamplingParams(); outrider.OptionError") == []


def test_the_check_can_fail() -> None:
    assert {"torch", "numpy"} <= set(heavy_after("from outrider import LLM"))


def test_names_imported_late_are_what_type_checkers_see() -> None:
    for name in outrider.__all__:
        assert getattr(outrider, name).__name__ == name and name in dir(outrider)
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        outrider.LMM  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LMM'"):
        exec("from outrider import LMM")


def test_help_names_every_verifier() -> None:
    (verifier,) = (entry for entry in fields(EngineOptions) if entry.name == "verifier")
    assert set(verifier.metadata["help"].split(";")[0].replace(" or ", ", ").split(", ")) == set(VERIFIERS)
    assert verifier.default in VERIFIERS
