"""benchmarks/mixed_steps.py on a CPU and a tiny model: what it tells of two bounds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "mixed_steps.py"
FLAGS = ["--device=cpu", "--model=tiny", "--requests=2", "--input-len=8", "--steps=3", "--repeats=2"]
BOTH = ["--prompts=2", "--prompt-len=100", "--bounds=10,512"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("mixed_steps", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e9)
    return module


def test_each_bound_has_its_row(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "there" / "mixed.json"
    script.main([*FLAGS, *BOTH, "--json", f"--output={output}"])
    told = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == told
    assert told.keys() >= {"commit", "device", "versions", "command", "floor_ms", "config"}
    assert told["default_bound"] == 2048 and told["config"]["prompts"] == 2
    few, whole = told["rows"]
    assert (few["bound"], whole["bound"]) == (10, 512)
    for row in (few, whole):
        assert row["before_ms"]["count"] == 2 * 2 * 3, "rounds, requests, steps"
        assert 0 < row["during_ms"]["median"] <= row["during_ms"]["largest"] <= row["first_token_ms"] + 1e3
        assert len(row["all_first_token_ms"]) == 2 and not row["num_preemptions"]
    assert whole["during_ms"]["count"] == 2 * 2 * 1, "one step runs both prompts"
    assert few["during_ms"]["count"] == 2 * 2 * 20, "200 tokens, ten a step, and everybody decodes beside them"


def test_left_out_the_bounds_are_the_default_and_none(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = script.main([*FLAGS, "--prompt-len=20", "--max-num-batched-tokens=4096"])
    assert [row["bound"] for row in result["rows"]] == [4096], "on a CPU the two are one"
    assert "1 x 20 prompt tokens arrive" in capsys.readouterr().out


def test_a_run_of_nothing_is_refused(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([*FLAGS, "--repeats=0"])
    assert "--repeats must be 1 or more: 0" in capsys.readouterr().err
