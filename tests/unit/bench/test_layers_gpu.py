"""benchmarks/layers_gpu.py where there is no GPU: what it runs, through Triton's interpreter, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.kernels.gpu import decoder_layer
from outrider.kernels.gpu.linear import FEW
from outrider.models.config import ModelConfig

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "layers_gpu.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("layers_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="through the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered")  # what a part that is left out would have written
def test_what_is_left_out_does_not_run_and_all_else_does(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_dict(json.loads((SCRIPT.parent / "shapes" / "tiny" / "config.json").read_text()))
    ran: list[str] = []
    names = {0: ""}

    def seen(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*given: Any, **how: Any) -> Any:
            ran.append(name(*given))
            return function(*given, **how)

        return call

    monkeypatch.setattr(
        decoder_layer, "few_rows", seen(decoder_layer.few_rows, lambda x, weight, *_: names[weight.data_ptr()])
    )
    monkeypatch.setattr(
        decoder_layer, "rope_attention_gpu", seen(decoder_layer.rope_attention_gpu, lambda *_: "attention")
    )
    with torch.inference_mode():
        layers = script.Layers(replace(config, num_layers=1), torch.device("cpu"), 1, 20)
        names = layers._of
        seen_of_each: list[list[str]] = []

        def count(run: Callable[[], None]) -> float:
            ran.clear()
            run()
            seen_of_each.append([*ran])
            return len(ran) / 1e6

        found = script.measure(layers, 1, 1, 2, count)
    order = ["qkv", "attention", "out", "gate_up", "down"]
    assert seen_of_each == [[part for part in order if part not in parts] for parts in script.LEFT_OUT.values()]
    assert found == {name: 5 - len(parts) for name, parts in script.LEFT_OUT.items()}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "qwen3-9b"], "no such shape: qwen3-9b"),
        (["--steps", "8x8"], f"products of more than {FEW} rows"),
        (["--steps", "8"], "invalid _steps value"),
        (["--context", "4"], "less than the 8 tokens"),
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
