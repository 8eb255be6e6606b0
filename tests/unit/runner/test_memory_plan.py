"""Memory is counted before anything is loaded, and the count is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from checkpoints import cache_bytes, program
from outrider import LLM, CapacityError, OptionError, device
from outrider.config import resolve
from outrider.core.sizes import MIB
from outrider.options import EngineOptions
from outrider.runner import memory
from outrider.runner.capture import CaptureOptions
from outrider.runner.graph import GraphRunner
from outrider.runner.memory import MemoryPlan

BLOCK = cache_bytes(1)


def plan(path: Path, **options: Any) -> MemoryPlan:
    return resolve(EngineOptions.from_kwargs(model=str(path), device="cpu", **options)).runner.memory


@pytest.fixture
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


@pytest.mark.parametrize("spare", [0, 1, BLOCK - 1])
def test_as_many_blocks_as_the_bytes_hold(path: Path, spare: int) -> None:
    found = plan(path, max_model_len=64, kv_cache_memory=9 * BLOCK + spare)
    assert (found.bytes_per_block, found.num_blocks, found.num_tokens) == (BLOCK, 9, 144)
    assert found.cache == 9 * BLOCK
    assert found.to_dict()["num_tokens"] == 144


@pytest.mark.parametrize("length", [2, 16, 17, 63, 64])
def test_one_whole_sequence_must_fit(path: Path, length: int) -> None:
    blocks = -(-length // 16)
    assert plan(path, max_model_len=length, kv_cache_memory=blocks * BLOCK).num_blocks == blocks
    with pytest.raises(
        CapacityError, match=f"max_model_len {length} .*or .* tokens: lower max_model_len or raise kv_cache_memory"
    ):
        plan(path, max_model_len=length, kv_cache_memory=blocks * BLOCK - 1)


def test_unasked_it_takes_a_share_of_what_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = plan(path, max_model_len=64, max_num_seqs=8)
    assert used.num_blocks == 8 * 4, "no more than all sequences could fill"
    free = used.weights + used.workspace + 11 * BLOCK / memory.HOST_SHARE
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert plan(path, max_model_len=64, max_num_seqs=8).num_blocks == 11
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.raises(CapacityError, match=r"there is room for 0\.0 MiB"):
        plan(path, max_model_len=64)


def test_a_length_that_nobody_asked_for_is_lowered_to_what_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SHORTEST", 32)
    used = plan(path, max_num_seqs=8)
    assert used.max_model_len == 256, "the model's own limit"
    monkeypatch.setattr(memory, "free_memory", lambda device: used.weights + used.workspace + 10 * BLOCK)
    assert plan(path, max_num_seqs=8).max_model_len == 5 * 16
    with pytest.raises(CapacityError, match="or 80 tokens"):
        plan(path, max_num_seqs=8, max_model_len=256)


def test_more_cache_than_there_is_memory_is_refused(path: Path) -> None:
    with pytest.raises(CapacityError, match="kv_cache_memory asks for"):
        plan(path, kv_cache_memory=10**15)


def test_free_memory_is_what_programs_could_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = device.free_memory(torch.device("cpu"))
    assert 1 << 28 < free <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert device.free_memory(torch.device("cpu")) == 4000


def test_more_rows_need_more_room(path: Path) -> None:
    base = plan(path, max_model_len=64, max_num_seqs=8).workspace
    drafting = {"method": "ngram", "num_speculative_tokens": 4}
    assert plan(path, max_model_len=64, max_num_seqs=16).workspace > base
    assert plan(path, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=4096).workspace > base
    assert plan(path, max_model_len=64, max_num_seqs=8, speculative_config=drafting).workspace > base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_planned_is_what_is_held(path: Path, dtype: torch.dtype) -> None:
    room = cache_bytes(7, dtype)
    with LLM(str(path), max_model_len=64, dtype=dtype, kv_cache_memory=room, device="cpu") as llm:
        planned, running = llm.engine.resolved.runner.memory, program(llm)
        assert sum(layer.key.nbytes + layer.value.nbytes for layer in running._cache) == planned.cache
        assert sum(slot.nbytes for slot in running._model.slots().values()) == planned.weights
        assert llm.engine._scheduler.cache.num_blocks == planned.num_blocks == 7


# On a GPU that torch only tells of: nothing is put on it.

NGRAM = {"method": "ngram", "num_speculative_tokens": 7}


def gpu_plan(path: Path, **options: Any) -> MemoryPlan:
    return resolve(EngineOptions.from_kwargs(model=str(path), device="cuda", **options)).runner.memory


def test_recorded_programs_are_the_graph_runners_alone_and_taken_off_the_cache(
    path: Path, fake_gpu: Callable[..., None]
) -> None:
    fake_gpu()
    options = {"max_model_len": 64, "max_num_seqs": 8, "speculative_config": NGRAM}
    graph, eager = gpu_plan(path, **options), gpu_plan(path, **options, runner="eager")
    sizes = (1, 2, 3, 4, 6, 8)
    assert graph.programs == GraphRunner.footprint(CaptureOptions(sizes, (7,))) > 0 and eager.programs == 0
    assert (graph.weights, graph.workspace) == (eager.weights, eager.workspace)
    assert graph.to_dict()["programs"] == graph.programs
    fewer = gpu_plan(path, **options, capture_sizes=[8])
    assert fewer.programs == GraphRunner.footprint(CaptureOptions((8,), (7,))) < graph.programs
    two = gpu_plan(path, **options, capture_drafts=[3])
    assert two.programs == GraphRunner.footprint(CaptureOptions(sizes, (3, 7))) > graph.programs
    without_drafts = gpu_plan(path, max_model_len=64, max_num_seqs=8)
    assert without_drafts.programs < graph.programs, "there is less to record"
    options = {**options, "max_num_seqs": 64, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.5}
    tight = gpu_plan(path, **options, capture_sizes=[64])
    free = tight.weights + tight.workspace + tight.programs + 100 * BLOCK
    fake_gpu(free=free)
    assert gpu_plan(path, **options, capture_sizes=[64]).num_blocks == 50
    assert gpu_plan(path, **options, runner="eager").num_blocks == min(50 + tight.programs // BLOCK // 2, 256)


def test_logits_are_counted_once_where_kernels_work_in_place(path: Path, fake_gpu: Callable[..., None]) -> None:
    options = {"max_model_len": 64, "max_num_seqs": 128, "speculative_config": NGRAM}
    logits = 128 * 8 * 260 * 4
    workspace = {}
    for name, special in {"kernels": {}, "torch": {"triton": False}, "old": {"capability": (7, 5)}}.items():
        fake_gpu(**special)
        workspace[name] = gpu_plan(path, **options).workspace
    assert workspace["torch"] == workspace["old"] == workspace["kernels"] + 2 * logits


def test_too_little_memory_is_said_before_anything_is_loaded(
    path: Path, fake_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(GraphRunner, "build", lambda *_: loaded.append(_))
    fake_gpu(free=64 * MIB)
    with pytest.raises(CapacityError, match=r"room for 0\.0 MiB, or 0 tokens, of 64\.0 MiB free on cuda: ") as refused:
        LLM(str(path), device="cuda", max_model_len=64)
    for what in ("weights take", "workspace", "recorded programs", "lower max_model_len, max_num_seqs or"):
        assert what in str(refused.value)
    with pytest.raises(
        CapacityError, match=r"beside weights, workspace and recorded programs 0\.0 MiB are free: lower"
    ):
        LLM(str(path), device="cuda", max_model_len=64, kv_cache_memory=9 * BLOCK)
    fake_gpu()
    with pytest.raises(OptionError, match="max_num_batched_tokens 7 cannot hold one row of 7 drafts and a token"):
        LLM(str(path), device="cuda", max_num_batched_tokens=7, speculative_config=NGRAM)
    with pytest.raises(OptionError, match="max_num_batched_tokens 100 is less than max_num_seqs 128"):
        LLM(str(path), device="cuda", max_num_batched_tokens=100)
    assert not loaded
