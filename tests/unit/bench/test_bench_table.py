"""benchmarks/gpu_decode_table.py on a CPU and a tiny model: what it writes, and that a cell may fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_decode_table.py"
FLAGS = ["--device=cpu", "--models=tiny", "--steps=3", "--concurrency=1,2", "--input-len=16", "--output-len=64"]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_decode_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROUNDS", 4)
    monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e9)
    return module


def test_every_cell_is_measured_and_written(table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "there" / "table.json"
    table.main([*FLAGS, f"--output={output}", "--parts"])
    written = json.loads(output.read_text())
    named = [(cell["method"], cell["concurrency"]) for cell in written["cells"]]
    assert named == [(method, concurrency) for method in table.METHODS for concurrency in (1, 2)]
    for cell in written["cells"]:
        assert cell["error"] is None and cell["steady_tokens_per_second"] > 0 and cell["vllm"] is None
    assert [engine["method"] for engine in written["engines"]] == [*table.METHODS]
    assert written.keys() >= {"commit", "device", "versions", "command", "seconds", "vllm"}
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(written["cells"])


def test_a_cell_that_fails_stops_nothing(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = table.measure

    def fails_at_two(llm: Any, workload: Any, concurrency: int, *rest: Any) -> Any:
        if concurrency == 2:
            raise RuntimeError("CUDA out of memory\nand more")
        return measure(llm, workload, concurrency, *rest)

    monkeypatch.setattr(table, "measure", fails_at_two)
    output = tmp_path / "table.json"
    table.main([*FLAGS, "--methods=none,peagle-7", "--concurrency=2,1", f"--output={output}"])
    errors = [cell["error"] for cell in json.loads(output.read_text())["cells"]]
    assert errors == ["RuntimeError: CUDA out of memory", None] * 2


def test_an_engine_that_cannot_be_built_is_told(table: Any, tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    table.main([*FLAGS, "--methods=peagle-7,none", "--max-model-len=70", f"--output={output}"])
    cells = json.loads(output.read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["peagle-7", "none"]
    assert all("max_model_len 70" in cell["error"] and cell["concurrency"] is None for cell in cells)


def test_no_engine_is_built_when_time_is_up(table: Any) -> None:
    result = table.main([*FLAGS, "--budget=0"])
    assert {cell["error"] for cell in result["cells"]} == {"no time was left"}


def test_ratios_to_vllm(table: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.VLLM, "tiny", {"peagle-3": {1: (100, 20.0)}})
        result = table.main([*FLAGS, "--methods=peagle-3", "--concurrency=1"])
    (cell,) = result["cells"]
    assert cell["ratio"] == pytest.approx(cell["steady_tokens_per_second"] / 100)
    assert cell["nominal_ratio"] == pytest.approx(2.83 / cell["step_ms"] * 1e3 / 100)


def test_the_issues_table_is_whole(table: Any) -> None:
    for model in table.MODELS:
        wanted = {method for method in table.METHODS if (model, method) not in table.LEFT_OUT}
        assert table.VLLM[model].keys() == wanted
        for method, row in table.VLLM[model].items():
            assert row.keys() == {1, 8, 32, 128}
            nominal = 1 + sum(table.RATES[: table.METHODS[method][1]])
            for concurrency, (rate, step_ms) in row.items():
                assert rate == pytest.approx(1e3 * concurrency * nominal / step_ms, rel=0.08), "a typing error"
