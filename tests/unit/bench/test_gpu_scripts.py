"""benchmarks/products_gpu.py and layers_gpu.py where there is no GPU: what they would time, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.kernels.gpu import decoder_layer
from outrider.kernels.gpu.linear import FEW, tiles
from outrider.models.config import ModelConfig

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHAPES = BENCHMARKS / "shapes"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)  # as for a script that is run from there
    return import_module


def config_of(model: str) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((SHAPES / model / "config.json").read_text()))


def test_a_sweep_tries_what_the_rule_says(script: Callable[[str], Any]) -> None:
    products = script("products_gpu")
    for name, outputs, inputs in (("qkv", 6144, 4096), ("out", 4096, 4096), ("gate_up", 12288, 4096)):
        each = products.Product(name, outputs, inputs)
        for rows in (1, 8, 16, FEW):
            tried = products.grid(rows, each)
            assert tiles(rows, outputs, inputs, 2, gate=each.gate) in tried and len(tried) == len({*tried}) > 50


@pytest.mark.skipif(torch.cuda.is_available(), reason="through the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered")  # what a part that is left out would have written
def test_what_is_left_out_does_not_run_and_all_else_does(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = script("layers_gpu")
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
        layers = timing.Layers(replace(config_of("tiny"), num_layers=1), torch.device("cpu"), 1, 20)
        names = layers._of
        seen_of_each: list[list[str]] = []

        def count(run: Callable[[], None]) -> float:
            ran.clear()
            run()
            seen_of_each.append([*ran])
            return len(ran) / 1e6

        found = timing.measure(layers, 1, 1, 2, count)
    order = ["qkv", "attention", "out", "gate_up", "down"]
    assert seen_of_each == [[part for part in order if part not in parts] for parts in timing.LEFT_OUT.values()]
    assert found == {name: 5 - len(parts) for name, parts in timing.LEFT_OUT.items()}


def test_steps_of_long_rows_or_too_many_are_not_timed(script: Callable[[str], Any]) -> None:
    fits = script("layers_gpu").runs_in_few
    config = config_of("qwen3-8b")
    assert all(fits(config, sequences, num_query, 132) for sequences, num_query in ((1, 1), (1, 16), (32, 1), (4, 8)))
    assert not fits(config, 1, 32, 132) and not fits(config, 32, 1, 108)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("products_gpu", ["--models", "qwen3-9b"], "no such shape: qwen3-9b"),
        ("products_gpu", ["--sweep", "--rows", "8,64"], f"--rows 64: only products of up to {FEW}"),
        ("products_gpu", [], "timed on a CUDA device"),
        ("layers_gpu", ["--model", "qwen3-9b"], "invalid choice: 'qwen3-9b'"),
        ("layers_gpu", ["--steps", "8x8"], f"products of more than {FEW} rows"),
        ("layers_gpu", ["--steps", "8"], "invalid _steps value"),
        ("layers_gpu", ["--context", "4"], "less than the 8 tokens"),
        ("layers_gpu", [], "timed on a CUDA device"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    script: Callable[[str], Any],
    name: str,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script(name).main(flags)
    assert said in capsys.readouterr().err
