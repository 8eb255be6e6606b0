"""The benchmarks on a CUDA device, at tiny sizes: that they run, not what they find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.bench import kernels
from outrider.bench.bandwidth import matmul_rate, read_bandwidth
from outrider.bench.kernels import bench_kernels
from outrider.bench.prefill import bench_prefill
from outrider.bench.speed import Workload, bench
from outrider.engine.llm import LLM
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig
from outrider.options import EngineOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
GPU = torch.device("cuda")


def options(kind: str) -> EngineOptions:
    return EngineOptions(
        model=str(SHAPES / "tiny"),
        load_format="dummy",
        device="cuda",
        max_num_seqs=4,
        capture_sizes=[1, 4],
        kv_cache_memory=1 << 24,
        speculative_config={"model": str(SHAPES / f"tiny-{kind}"), "num_speculative_tokens": 3},
        verifier="synthetic",
        synthetic_rates=[0.75, 0.6, 0.48],
    )


def test_rates_are_a_gpus() -> None:
    assert 1e11 < read_bandwidth(GPU) < 2e13
    assert 1e12 < matmul_rate(GPU, torch.bfloat16) < 1e16


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_speed(kind: str) -> None:
    result = bench(options(kind), Workload(16, 128, max_steps=10), [1, 4], 1)
    assert result["parts_error"] is None and result["memory"]["used"] > 0
    for row in result["rows"]:
        assert row["steady_steps"] == 10 and row["floor_share"] > 0
        assert row["parts_on"] == "host" or row["parts_ms"].keys() == {"inputs", "target", "verify", "draft", "gap"}


def test_prefill() -> None:
    with LLM.from_options(options("peagle")) as llm:
        assert bench_prefill(llm, 4, 64, 1)["share_of_matmul"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_is_timed_in_a_graph(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LONG", 10.0)  # the first call of a kernel may still be slow
    config = ModelConfig.from_dict(read_json(SHAPES / "tiny" / "config.json"))
    result = bench_kernels(config, "tiny", GPU, dtype=dtype, rows=(1, 3), num_drafts=3, context=40, prefill=24)
    assert result["not_timed"] == []
    for row in result["rows"]:
        assert row["errors"] == () and row["reference_us"] > 0, row
        assert row["graph"] or row["kernel_us"] is None, "a kernel that reads on the host cannot be part of a step"
