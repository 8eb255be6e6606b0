"""The GPU's products of few rows, with all that they do on the way, and the layers made of them.

On a GPU, and everywhere else through Triton's interpreter.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernel_examples import examples
from outrider.kernels.decoder_layer import DECODER_LAYER, decoder_layer_reference
from outrider.kernels.gpu import decoder_layer as gpu_decoder_layer
from outrider.kernels.gpu.linear import TICKETS, Tiles, few_rows, tiles
from outrider.kernels.gpu.partial_norm import Rows, scale_rows
from outrider.kernels.linear import LINEAR

DEVICES = [
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
    pytest.param("cpu", marks=pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="not interpreted")),
]
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}
SHAPES = [
    (1, 64, 32),
    (1, 1024, 16),
    (1, 129, 7),
    (3, 256, 40),
    (8, 67, 5),
    (16, 512, 24),
    (9, 200, 19),
]


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str, spread: float = 1.0) -> Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def cuts(rows: int, outputs: int, inputs: int, dtype: torch.dtype, gate: bool) -> list[Tiles]:
    """The rule's own, and one with columns and steps left over."""
    slices = 0 if rows == 1 else 1 if dtype == torch.float32 else 4
    own = {tiles(rows, outputs, inputs, dtype.itemsize, gate=gate, roomy=roomy) for roomy in (False, True)}
    return [*own, Tiles(4, 128, slices)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_product_with_all_it_does_on_the_way(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str
) -> None:
    def make(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
        return draw(*shape, seed=seed, dtype=dtype, device=device, spread=spread)

    x, norm = make(rows, inputs, seed=0), 1 + make(inputs, seed=1)
    weight, bias = make(2 * outputs, inputs, seed=2, spread=inputs**-0.5), make(2 * outputs, seed=3)
    stream, next_norm = make(rows, outputs, seed=4), make(outputs, seed=5)
    half, tolerance = weight[:outputs], ROUNDING[dtype]
    for cut in cuts(rows, outputs, inputs, dtype, False):
        added = stream.clone()
        after = few_rows(x, half, added, add=True, next_norm=next_norm, eps=1e-5, cut=cut)
        assert distance(added, stream.double() + x.double() @ half.double().T) < tolerance
        assert after is not None and after.eps == 1e-5
        squares = added.double().square().sum(1)
        assert distance(after.squares.sum(0), squares) < 1e-6
        root = torch.rsqrt(squares / outputs)[:, None] * (256 if dtype == torch.float16 else 1)
        assert distance(after.scaled.double() * root, normed(added, next_norm, 0)) < tolerance
    rows_normed, out = scale_rows(None, x, norm, 1e-6), torch.full_like(stream, torch.nan)
    for cut in cuts(rows, outputs, inputs, dtype, False):
        few_rows(rows_normed, half, out, bias=bias[:outputs], cut=cut)
        exact = normed(x, norm, 1e-6) @ half.double().T + bias[:outputs].double()
        assert distance(out, exact) < tolerance
    gate, up = (normed(x, norm, 1e-6) @ weight.double().T + bias.double()).chunk(2, dim=-1)
    for cut in cuts(rows, outputs, inputs, dtype, True):
        few_rows(rows_normed, weight, out.fill_(torch.nan), bias=bias, gate=True, cut=cut)
        assert distance(out, functional.silu(gate) * up) < 2 * tolerance
        assert distance(out, functional.silu(up) * gate) > 0.1, "the halves are not told apart"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 256, 7), (5, 512, 40), (20, 1024, 70)])
def test_programs_that_share_inputs(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> None:
    """The last adds up what all have left, and leaves the tickets as they were; again and again the same bits."""
    x, weight = (
        draw(rows, inputs, seed=0, dtype=dtype, device=device),
        draw(2 * outputs, inputs, seed=1, dtype=dtype, device=device, spread=inputs**-0.5),
    )
    norm, stream = (
        1 + draw(inputs, seed=2, dtype=dtype, device=device),
        draw(rows, outputs, seed=3, dtype=dtype, device=device),
    )
    tickets, tolerance = torch.zeros(TICKETS, dtype=torch.int32, device=device), ROUNDING[dtype]
    slices = 0 if rows == 1 else 1
    added = []
    for cut in [Tiles(16, 64, slices, parts=2), *[Tiles(32, 64, slices, parts=4)] * 3]:
        added.append(stream.clone())
        after = few_rows(x, weight[:outputs], added[-1], add=True, next_norm=stream[0], cut=cut, tickets=tickets)
        assert distance(added[-1], stream.double() + x.double() @ weight[:outputs].double().T) < tolerance
        assert after is not None and distance(after.squares.sum(0), added[-1].double().square().sum(1)) < 1e-6
        assert not tickets.any()
    assert torch.equal(added[1], added[2]) and torch.equal(added[1], added[3])
    gate, up = (normed(x, norm, 1e-6) @ weight.double().T).chunk(2, dim=-1)
    out = torch.full_like(stream, torch.nan)
    cut = Tiles(8, 64, slices, parts=4)
    few_rows(scale_rows(None, x, norm, 1e-6), weight, out, gate=True, cut=cut, tickets=tickets)
    assert distance(out, functional.silu(gate) * up) < 2 * tolerance and not tickets.any()


def test_tickets_are_enough_and_parts_are_whole() -> None:
    for rows in (1, 2, 8, 9, 16, 17, 32):
        for hidden, width in ((256, 704), (1024, 3072), (2048, 6144), (2560, 9728), (4096, 12288), (5120, 25600)):
            for outputs, inputs in ((hidden + 2048, hidden), (hidden, hidden), (hidden, width), (hidden, 3 * hidden)):
                cut = tiles(rows, outputs, inputs, 2)
                assert cut.parts == 1 or (
                    inputs % (cut.parts * cut.inputs) == 0 and -(-outputs // cut.outputs) < TICKETS
                )
    assert tiles(32, 4096, 12288, 2).parts == tiles(16, 2560, 9728, 2).parts == 2


def test_few_programs_get_a_multiprocessor_each_where_there_is_room() -> None:
    """Else they crowd onto half of them: a third buffer of 48 KiB keeps a second program off."""
    for outputs, inputs, stages in (
        (1024, 2048, 4),
        (1024, 3072, 4),
        (2048, 6144, 4),
        (2048, 2048, 3),
        (4096, 12288, 3),
    ):
        assert tiles(8, outputs, inputs, 2, roomy=True) == Tiles(16, 1024, 4, 4, stages)
        assert tiles(8, outputs, inputs, 2) == Tiles(16, 1024, 4, 4, 3)


def test_one_rows_steps_leave_few_threads_idle_and_are_two_where_outputs_are_many() -> None:
    for outputs, inputs in ((6144, 2560), (2560, 9728), (1024, 3072), (4096, 1024), (6144, 4096), (4096, 12288)):
        step = tiles(1, outputs, inputs, 2).inputs
        assert -inputs % step <= 512
        assert outputs <= inputs or inputs >= 2 * step


@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_not_rounded_to_the_weights_type(device: str) -> None:
    for rows in (1, 3):
        x = draw(rows, 256, seed=0, dtype=torch.bfloat16, device=device)
        weight = draw(33, 256, seed=1, dtype=torch.bfloat16, device=device)
        logits = LINEAR.kernel("cuda")(x, weight, upcast=True)
        assert logits.dtype == torch.float32 and distance(logits, x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_residual_stream_does_not_overflow_float16(device: str) -> None:
    x = draw(3, 128, seed=0, dtype=torch.float16, device=device)
    x[:, 5] = 3e4
    norm, weight = torch.full_like(x[0], 8.0), draw(16, 128, seed=1, dtype=torch.float16, device=device)
    assert not (x * norm).isfinite().all(), "the test would not notice"
    rows, out = scale_rows(None, x, norm, 1e-6), torch.empty(3, 16, dtype=torch.float16, device=device)
    few_rows(rows, weight, out)
    assert distance(out, normed(x, norm, 1e-6) @ weight.double().T) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_more_rows_than_a_stream_has_are_left_alone(device: str) -> None:
    """Neither rows nor columns past the end are written, whatever the tile."""
    x, weight = torch.ones(3, 64, device=device), torch.ones(7, 64, device=device)
    memory = torch.full((6, 7), -1.0, device=device)
    sums = Rows(x, torch.ones(1, 3, device=device), 1e-6)
    few_rows(sums, weight, memory[:3], cut=Tiles(4, 64))
    assert (memory[3:] == -1).all() and (memory[:3] != -1).all()


def layer_examples(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    found = examples(DECODER_LAYER, torch.Generator().manual_seed(3), torch.device(device), False)
    return [
        dict(case) for case in found if case["weights"].qkv.dtype == dtype and case["weights"].input_norm is not None
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_go_through_the_smaller_ops(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decoder_layer, "FEW", 0)
    for ours in layer_examples(device, torch.float32):
        theirs = copy.deepcopy(ours)
        theirs["residual"] += decoder_layer_reference(**theirs)
        assert DECODER_LAYER.kernel("cuda")(**ours) is None
        for name in DECODER_LAYER.outputs:
            assert distance(ours[name], theirs[name].double()) < 2e-6


@pytest.mark.parametrize("few", [16, 0], ids=["few", "many"])
@pytest.mark.parametrize("device", DEVICES)
def test_layers_hand_the_stream_on_and_show_it_at_auxiliary_layers(
    device: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_decoder_layer, "FEW", few)
    case = layer_examples(device, torch.float32)[1]
    cases = [copy.deepcopy(case) for _ in range(3)]
    cases[1]["weights"].post_norm.mul_(2)
    cases[2]["weights"].input_norm.mul_(3)
    weights = [each["weights"] for each in cases]
    caches = [(each["key_cache"].clone(), each["value_cache"].clone()) for each in cases]
    where = {name: case[name] for name in ("rope", "rows")}
    stream, entering = case["residual"].clone(), []
    for each in cases:
        entering.append(stream.clone())
        stream += decoder_layer_reference(**copy.deepcopy(each) | where | {"x": None, "residual": stream})
    expected, stream = stream, case["residual"].clone()
    stack = gpu_decoder_layer.DeviceLayerStack(weights, caches, 1e-6, case["scale"])
    features = torch.full((len(stream), 2 * stream.shape[1]), torch.nan, device=device)
    assert stack(0, 3, None, stream, **where, aux_layers=(2, 0), features=features) is None
    assert distance(stream, expected.double()) < 3e-6
    assert distance(features, torch.cat([entering[2], entering[0]], dim=1).double()) < 3e-6
