"""The GPU's norm, rotation, cache write and attention in one kernel: however it is cut up, and call after call.

On a GPU, and everywhere else through Triton's interpreter.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_examples import examples
from kernel_examples.layers import rope_attention_case
from outrider.kernels.decoder_layer import DECODER_LAYER
from outrider.kernels.gpu import decoder_layer as gpu_decoder_layer
from outrider.kernels.gpu import rope_attention as gpu_rope_attention
from outrider.kernels.gpu.attention import Tiles, choose_splits, count_tiles
from outrider.kernels.gpu.rope_attention import (
    choose_short_tiles,
    is_short,
    new_counters,
    rope_attend,
    rope_attention_gpu,
)
from outrider.kernels.rope_attention import rope_attention_reference
from outrider.tensors import PagedRows

DEVICES = [
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
    pytest.param("cpu", marks=pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="not interpreted")),
]
ROUNDING = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 5e-6}
ROWS = [(1, 97), (6, 70), (0, 5), (19, 50), (3, 3)]


def case(
    lengths: list[tuple[int, int]], device: str, dtype: torch.dtype = torch.float32, **given: Any
) -> dict[str, Any]:
    generator, heads = torch.Generator().manual_seed(4), given.pop("heads", (4, 2, 64))
    return dict(rope_attention_case(generator, torch.device(device), lengths, heads, dtype, dtype, **given))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, of what is a number in either; both must hold NaN in the same places."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    wide = theirs.double().nan_to_num()
    return float((ours.double().nan_to_num() - wide).norm() / wide.norm())


def check(found: Tensor, ours: dict[str, Any], given: dict[str, Any], tolerance: float) -> None:
    """What a call returned and wrote against the reference's."""
    theirs = copy.deepcopy(given)
    expected = rope_attention_reference(**theirs)
    assert distance(found, expected) < tolerance
    for name in ("key_cache", "value_cache"):
        assert distance(ours[name], theirs[name]) < tolerance


@pytest.mark.parametrize(
    ("tokens", "splits"),
    [
        # the interpreter takes most of a minute for the first of these; 8-40 has shares without keys too
        *(pytest.param(tokens, 40, marks=pytest.mark.slow) for tokens in (1, 4)),
        *((tokens, splits) for tokens in (1, 4, 8) for splits in (1, 2, 5)),
        (8, 40),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_result_does_not_depend_on_how_it_is_cut_up(device: str, tokens: int, splits: int) -> None:
    """Nor do rows longer than a tile, and shares without keys."""
    given = case(ROWS, device, padding=2)
    ours, counters = copy.deepcopy(given), torch.zeros(200, dtype=torch.int32, device=device)
    found = rope_attend(**ours, counters=counters, tiles=Tiles(16, tokens, 16, 4, 1), splits=splits)
    check(found, ours, given, ROUNDING[torch.float32])
    assert not counters.any() and not found[-2:].any()


@pytest.mark.parametrize(
    ("tokens", "context"),
    [(8, 50), (8, 400), *(pytest.param(1, context, marks=pytest.mark.slow) for context in (50, 400))],
)
@pytest.mark.parametrize("device", DEVICES)
def test_what_programs_without_work_would_have_left_is_not_looked_at(
    device: str, tokens: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave at once: of 40 programs few have work, or so many that they are added up together in the other way."""
    given, empty = case([(6, context), (6, 20)], device), torch.empty

    def filled(*shape: int, **how: Any) -> Tensor:
        return empty(*shape, **how).fill_(torch.nan)

    ours, counters = copy.deepcopy(given), torch.zeros(200, dtype=torch.int32, device=device)
    monkeypatch.setattr(torch, "empty", filled)
    found = rope_attend(**ours, counters=counters, tiles=Tiles(16, tokens, 16, 4, 1), splits=40)
    monkeypatch.undo()
    check(found, ours, given, ROUNDING[torch.float32])


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("lengths", [[(1, 130)], [(2, 40), (9, 35), (1, 1)], [(21, 21), (1, 48)]], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_what_no_row_holds_is_never_read(device: str, lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    given = case(lengths, device, dtype, heads=(6, 2, 80), padding=1, rest=torch.nan)
    given["qkv"][-1] = torch.nan  # of a token of no row
    ours = copy.deepcopy(given)
    found = rope_attention_gpu(**ours)
    assert found.isfinite().all() and not found[-1].any()
    given["qkv"][-1] = 0.0
    finite = {k: v.nan_to_num() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    assert distance(found, rope_attention_reference(**finite)) < ROUNDING[dtype]
    check(found, ours, given, ROUNDING[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_tokens_may_name_any_length_and_blocks(device: str) -> None:
    given = case([(2, 20), (1, 9), (0, 16), (0, 16), (0, 16)], device, padding=4)
    ours = copy.deepcopy(given)
    ours["rows"].seq_lens[2:] = torch.tensor([2**30, -5, -(2**30)])
    ours["rows"].block_table[2:] = 2**31 - 1
    check(rope_attention_gpu(**ours), ours, given, ROUNDING[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
def test_calls_share_counters_and_read_what_those_before_wrote(device: str) -> None:
    """A decode loop: each call's tokens are the next one's cache."""
    given = case([(5, 60), (5, 21)], device, heads=(4, 1, 64))
    rows, own = given["rows"], torch.tensor([0, 1], device=device).repeat_interleave(5)
    slot = rows.block_table[own, rows.positions // 16].long() * 16 + rows.positions % 16
    given["rows"] = rows = rows._replace(cache_slot=slot)
    ours, theirs = copy.deepcopy(given), copy.deepcopy(given)
    expected = rope_attention_reference(**theirs)
    counters = new_counters(torch.device(device), 1)
    starts = torch.arange(3, device=device, dtype=torch.int32)
    for step in range(5):
        now = torch.tensor([step, 5 + step], device=device)
        lens = rows.seq_lens - 4 + step
        one = PagedRows(rows.positions[now], rows.cache_slot[now], rows.block_table, starts, lens)
        call = ours | {"qkv": given["qkv"][now], "rows": one}
        found = rope_attention_gpu(**call, counters=counters)
        assert distance(found, expected[now]) < ROUNDING[torch.float32]
        assert not counters.any()
    for name in ("key_cache", "value_cache"):
        assert distance(ours[name], theirs[name]) < ROUNDING[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_result_is_the_same_whoever_comes_last(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other: once in order, and once the other way round."""
    given = case([(1, 300), (3, 90)], device)

    def call() -> Tensor:
        counters = torch.zeros(200, dtype=torch.int32, device=device)
        return rope_attend(**copy.deepcopy(given), counters=counters, tiles=Tiles(16, 4, 16, 4, 1), splits=7)

    first = call()
    if device == "cuda":
        assert all(torch.equal(call(), first) for _ in range(50))
        return
    from triton.runtime import interpreter

    builder, order = interpreter.interpreter_builder, []
    set_index = builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        order.append(6 - z)
        set_index(x, y, 6 - z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert torch.equal(call(), first) and order[:2] == [6, 5]


def test_counters_are_enough_for_every_step() -> None:
    device = torch.device("cpu")
    processors = gpu_rope_attention.multiprocessors(device)
    for num_kv_heads in (1, 2, 3, 8):
        counters = len(new_counters(device, num_kv_heads))
        for num_rows in range(1, 40):
            for num_tokens in range(1, 64 * num_rows, 7):
                for group, size in ((1, 2), (3, 2), (8, 4)):
                    tiles = choose_short_tiles(num_tokens, num_rows, group, size)
                    if choose_splits(num_tokens, num_rows, num_kv_heads, 10**6, tiles, processors) > 1:
                        assert count_tiles(num_tokens, num_rows, tiles.tokens) * num_kv_heads <= counters


def test_short_steps_are_those_whose_rows_fit_a_tile_and_run_at_once() -> None:
    for num_tokens, num_rows, group in ((1, 1, 64), (128, 128, 8), (32, 1, 2), (12, 3, 16)):
        assert is_short(num_tokens, num_rows, group, 1, 64)
    for num_tokens, num_rows, group in ((1, 1, 65), (33, 1, 2), (13, 3, 16), (0, 1, 1), (129, 129, 8)):
        assert not is_short(num_tokens, num_rows, group, 1, 64)
    assert is_short(33, 33, 4, 8, 132) and not is_short(34, 34, 4, 8, 132)


def is_short_case(case: Mapping[str, Any]) -> bool:
    return case["weights"].qkv.dtype == torch.float32 and len(case["residual"]) == 8


@pytest.mark.parametrize("device", DEVICES)
def test_layers_use_it_for_short_rows_and_two_kernels_for_prompts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = examples(DECODER_LAYER, torch.Generator().manual_seed(3), torch.device(device), False)
    example = next(dict(each) for each in cases if is_short_case(each))
    calls, found = [], []
    one_kernel = gpu_decoder_layer.rope_attention_gpu
    monkeypatch.setattr(gpu_decoder_layer, "rope_attention_gpu", lambda *given: calls.append(1) or one_kernel(*given))
    for tallest in (64, 0):
        monkeypatch.setattr(gpu_rope_attention, "TALLEST", tallest)
        given = copy.deepcopy(example)
        cache = given["key_cache"], given["value_cache"]
        stack = gpu_decoder_layer.DeviceLayerStack([given["weights"]] * 2, [cache] * 2, 1e-6, given["scale"])
        stack(0, 2, None, given["residual"], given["rope"], given["rows"])
        found.append((given["residual"], *cache))
        assert len(calls) == 2 and not stack._counters.any()
    assert all(distance(one, two) < 3e-6 for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("few", "expected"), [(32, ["late", "ahead"] * 2), (0, ["behind"] * 2)], ids=["few", "many"])
def test_attention_reads_ahead_only_behind_a_product_that_lets_it_come_late(
    few: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands between the two: no other test would notice, but a GPU would read what is not there yet."""
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("not interpreted")
    cases = examples(DECODER_LAYER, torch.Generator().manual_seed(3), torch.device("cpu"), False)
    given = next(dict(each) for each in cases if is_short_case(each))
    multiply, attend = gpu_decoder_layer.few_rows, gpu_decoder_layer.rope_attention_gpu
    order: list[str] = []

    def product(*args: Any, late: bool = False, **named: Any) -> Any:
        order.append("late" if late else "product")
        return multiply(*args, late=late, **named)

    def attention(*args: Any) -> Tensor:
        ahead, next_weight = args[-2:]
        assert next_weight is (weights.out if ahead else None)
        order.append("ahead" if ahead else "behind")
        return attend(*args)

    monkeypatch.setattr(gpu_decoder_layer, "FEW", few)
    monkeypatch.setattr(gpu_decoder_layer, "few_rows", product)
    monkeypatch.setattr(gpu_decoder_layer, "rope_attention_gpu", attention)
    weights, cache = given["weights"], (given["key_cache"], given["value_cache"])
    stack = gpu_decoder_layer.DeviceLayerStack([weights] * 2, [cache] * 2, 1e-6, given["scale"])
    stack(0, 2, None, given["residual"], given["rope"], given["rows"])
    assert [each for each in order if each != "product"] == expected
    assert all(order[at + 1] == "ahead" for at, each in enumerate(order) if each == "late")
