"""Rows of `outrider bench`: floors, parts, and what happens where a part of a run fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emulated import Emulated
from outrider import LLM
from outrider import config as config_module
from outrider.bench import speed
from outrider.bench.floors import Reads
from outrider.bench.prefill import bench_prefill, prefill_operations
from outrider.bench.speed import Workload, bench
from outrider.engine.engine import Engine
from outrider.errors import OptionError
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig
from outrider.options import EngineOptions
from outrider.workers.base import WorkerStats

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
PARTS = {"inputs": 0.01, "target": 0.6, "verify": 0.04, "draft": 0.25, "gap": 0.1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "read_bandwidth", lambda device: 1e9)


def options(**given: Any) -> EngineOptions:
    drafting = {"model": str(SHAPES / "tiny-peagle"), "num_speculative_tokens": 7}
    made_up = {"verifier": "synthetic", "synthetic_rates": (0.75, 0.6, 0.48, 0.38, 0.3, 0.24, 0.19)}
    return EngineOptions(
        model=str(SHAPES / "tiny"),
        load_format="dummy",
        device="cpu",
        max_num_seqs=4,
        speculative_config=drafting,
        **made_up,
        **given,
    )


def test_floors_are_counted_apart() -> None:
    result = bench(options(), Workload(16, 64, max_steps=5), [1, 4], 2)
    with LLM.from_options(options()) as llm:
        reads, weights = Reads.of(llm.engine.resolved), llm.engine.resolved.runner.memory.weights
    config = read_json(SHAPES / "tiny" / "config.json")
    both = weights - 2 * config["vocab_size"] * config["hidden_size"]  # the head's own embedding is not read
    assert 0 < reads.draft < reads.target and reads.target + reads.draft <= both
    assert reads.cache_per_token == 2 * 2 * 4 * 2 * 16  # bytes, keys and values, layers, heads, head_dim
    for row in result["rows"]:
        assert row["floor_parts_ms"]["target"] == pytest.approx(reads.target / 1e6)
        assert row["floor_ms"] == pytest.approx((reads.target + reads.draft) / 1e6)
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["step_ms"])
        assert row["steady_steps"] == 10 and row["num_preemptions"] == 0 and row["parts_on"] == "host"
        rate = row["concurrency"] * row["acceptance_length"] / row["step_ms"] * 1e3
        assert row["steady_tokens_per_second"] == pytest.approx(rate), "every step counts every request once"
    alone, together = (row["floor_parts_ms"]["cache"] for row in result["rows"])
    assert together > 3 * alone > 3 * 16 * reads.cache_per_token / 1e6
    assert result["memory"]["plan"]["weights"] == weights and result["memory"]["used"] is None
    assert result["memory"]["recorded"] is None, "the eager runner records nothing"


def test_parts_that_the_device_timed_replace_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Engine,
        "worker_stats",
        lambda engine: WorkerStats(PARTS if engine.resolved.options.time_parts else None, None, 0),
    )
    result = bench(options(), Workload(16, 64, max_steps=3), [1], 1, parts=True)
    (row,) = result["rows"]
    assert row["parts_ms"] == PARTS and row["parts_on"] == "device" and result["parts_error"] is None
    assert row["host_ms"].keys() == {"schedule", "run", "apply"}
    (row,) = bench(options(), Workload(16, 64, max_steps=3), [1], 1)["rows"]
    assert row["parts_ms"] == row["host_ms"], "on a CPU nobody asks the device unasked"


def test_a_runner_two_steps_deep_is_measured_and_times_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph runner, emulated: its marks are a millisecond apart, its results one step late."""
    monkeypatch.setattr(config_module, "RUNNERS", (Emulated,))
    result = bench(options(capture_sizes=(1, 4)), Workload(16, 64, max_steps=5), [1, 4], 2, parts=True)
    assert result["parts_error"] is None and result["config"]["runner"] == "graph"
    recorded = result["memory"]["recorded"]
    assert recorded["seconds"] > 0 and recorded["bytes"] == 0, "the emulation takes nothing of a device"
    for row in result["rows"]:
        assert row["steady_steps"] == 10 and row["parts_on"] == "device"
        assert row["parts_ms"] == pytest.approx(dict.fromkeys(PARTS, 1.0))
        rate = row["concurrency"] * row["acceptance_length"] / row["step_ms"] * 1e3
        assert row["steady_tokens_per_second"] == pytest.approx(rate)


def test_what_was_measured_survives_a_failure_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "times_of_parts", fails)
    result = bench(options(), Workload(16, 64, max_steps=3), [1], 1, parts=True)
    assert result["parts_error"] == "RuntimeError: out of memory"
    assert result["rows"][0]["step_ms"] > 0 and result["rows"][0]["parts_on"] == "host"


def test_a_workload_that_does_not_fit_is_refused() -> None:
    for workload, concurrency, said in ((Workload(16, 64), 5, "max_num_seqs 4"), (Workload(2000, 64), 1, "2064")):
        with pytest.raises(OptionError, match=said):
            bench(options(), workload, [concurrency], 1)


def test_batches_share_nothing_that_a_cache_could_reuse() -> None:
    with LLM.from_options(options()) as llm:
        drawn = [Workload(16, 1).batch(llm, count, seed) for count in (1, 4) for seed in (0, 1)]
    prompts = [tuple(prompt) for batch in drawn for prompt in batch]
    assert len({prompt[:4] for prompt in prompts}) == len(prompts)


def test_operations_of_a_prefill() -> None:
    config = ModelConfig.from_dict(read_json(SHAPES / "qwen3-8b" / "config.json"))
    products, attention = prefill_operations(config, 8, 2048)
    layers = 8.191e9 - 2 * 151936 * 4096
    assert products == pytest.approx(2 * layers * 8 * 2048, rel=1e-3)
    assert attention == 8 * sum(4 * 4096 * 36 * (place + 1) for place in range(2048))


def test_prefill_runs() -> None:
    with LLM.from_options(options()) as llm:
        result = bench_prefill(llm, 3, 40, 2)
    assert len(result["all_seconds"]) == 2 and result["config"]["num_prompts"] == 3
    assert result["tokens_per_second"] == pytest.approx(120 / result["seconds"])
    assert 0 < result["share_of_matmul"] == pytest.approx(result["tflops"] / result["matmul_tflops"])
