"""`outrider bench kernels`: every op is timed, and one that fails stops nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.bench import kernels
from outrider.bench.kernel_cases import cases
from outrider.bench.kernel_sizes import Case, Sizes
from outrider.bench.kernels import bench_kernels
from outrider.kernels.op import Op
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig

CONFIG = Path(__file__).parents[3] / "benchmarks" / "shapes" / "tiny" / "config.json"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ENOUGH", 0.0)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(kernels, "matmul_rate", lambda device, dtype: 1e12)


def timed(dtype: torch.dtype = torch.bfloat16, rows: tuple[int, ...] = (1, 3), **given: Any) -> dict[str, Any]:
    config = ModelConfig.from_dict(read_json(CONFIG))
    sizes = {"rows": rows, "num_drafts": 3, "context": 40, "prefill": 24}
    return bench_kernels(config, "tiny", CPU, dtype=dtype, **{**sizes, **given})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_op_is_timed(dtype: torch.dtype) -> None:
    result = timed(dtype)
    assert result["not_timed"] == [], "an op without a case in bench/kernel_cases.py or bench/step_cases.py"
    for row in result["rows"]:
        assert row["errors"] == (), row
        assert row["reference_us"] > 0 and row["floor_us"] > 0
    with_kernel = {op.name for op in kernels.all_ops() if "cpu" in op.kernels}
    assert {row["op"] for row in result["rows"] if row["kernel_us"]} == with_kernel
    assert [row["rows"] for row in result["rows"] if row["case"].startswith("prefill")] == [1], "once is enough"


def test_one_op_alone() -> None:
    result = timed(only=["linear"])
    assert [row["case"] for row in result["rows"]] == 2 * ["qkv", "out", "gate_up", "down", "lm_head"]


def test_bytes_and_operations_of_a_product() -> None:
    config = ModelConfig.from_dict(read_json(CONFIG))
    made = [make() for make in cases(Sizes(config, 3, 3, 40, 0, CPU, torch.bfloat16))]
    product = next(case for case in made if case.name == "lm_head")
    assert product.operations == 2 * 3 * 512 * 64
    assert product.num_bytes == 2 * 512 * 64 + 4 * 3 * (512 + 64)
    assert len({call["weight"].data_ptr() for call in product.copies}) == len(product.copies) > 1


def test_a_failure_is_a_row_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**given: Any) -> None:
        raise RuntimeError("no such kernel\nat all")

    def made(sizes: Sizes) -> Case:
        return Case(Op("planted", lambda: None, ()), "", [{}], 8, kernel=broken)

    def not_made(sizes: Sizes) -> Case:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(kernels, "cases", lambda sizes: iter([partial(not_made, sizes), partial(made, sizes)]))
    first, second = timed(rows=(1,))["rows"]
    assert (first["op"], first["errors"]) == ("not_made", ("OutOfMemoryError: too large",))
    assert second["errors"] == ("RuntimeError: no such kernel",)
    assert second["kernel_us"] is None and second["reference_us"] > 0
