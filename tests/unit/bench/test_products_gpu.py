"""benchmarks/products_gpu.py where there is no GPU: what it would try, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.kernels.gpu.linear import FEW, tiles

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "products_gpu.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("products_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "products_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_a_sweep_tries_what_the_rule_says(script: Any) -> None:
    for name, outputs, inputs in (("qkv", 6144, 4096), ("out", 4096, 4096), ("gate_up", 12288, 4096)):
        each = script.Product(name, outputs, inputs)
        for rows in (1, 8, 16, FEW):
            tried = script.grid(rows, each)
            assert tiles(rows, outputs, inputs, 2, gate=each.gate) in tried and len(tried) == len({*tried}) > 50


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "qwen3-9b"], "no such shape: qwen3-9b"),
        (["--sweep", "--rows", "8,64"], f"--rows 64: only products of up to {FEW}"),
        ([], "timed on a CUDA device"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    script: Any, flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(flags)
    assert said in capsys.readouterr().err
