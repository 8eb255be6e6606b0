"""Every op's kernels against its reference, and what a kernel promises beyond it.

New memory is filled with NaN while a kernel runs, so that a number it forgets to write, or reads before anyone has
written it, is not a plausible zero.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_examples import examples
from outrider.bench.kernels import all_ops
from outrider.kernels.attention import PAGED_ATTENTION, paged_attention_reference
from outrider.kernels.cpu import amx
from outrider.kernels.cpu.decoder_layer import DeviceLayerStack
from outrider.kernels.decoder_layer import DECODER_LAYER, layers_by_ops
from outrider.kernels.gpu.attention import Tiles, attend
from outrider.kernels.linear import LINEAR
from outrider.kernels.norm import ADD_RMS_NORM, RMS_NORM
from outrider.kernels.op import Op
from outrider.kernels.records import HeadNorms, LayerWeights
from outrider.kernels.rope import ROPE_STORE
from outrider.tensors import PagedRows

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return leaves([getattr(value, field.name) for field in fields(value)])
    if isinstance(value, dict):
        return leaves(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def distance(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||, nan where either holds one that the other does not."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    wide = theirs.double()
    gap = torch.where(same, 0, ours.double() - wide)
    return float(gap.norm() / wide.nan_to_num(0.0).norm())


def close(ours: Any, theirs: Any, tolerance: float, tolerance_16bit: float = 0.0) -> bool:
    """`tolerance_16bit`: the tolerance for numbers of 16 bits, where it is more."""
    pairs = list(zip(leaves(ours), leaves(theirs), strict=True))
    return all(
        distance(a, b) <= (tolerance if b.element_size() > 2 else max(tolerance, tolerance_16bit)) for a, b in pairs
    )


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -(10**9) if made.dtype != torch.bool else True)

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


OPS = all_ops()


INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)
SMALL_EXAMPLES = {"decoder_layer": 4, "rope_attention": 6, "truncate": 5}
"""How many of an op's examples the interpreter runs in `make test`, the smallest ones; 16 of any other op."""


def cases() -> Iterator[Any]:
    """Each op on each device: the op, the device, and the number of its smallest examples; None: all of them."""
    for op in OPS:
        # an op without a kernel for CPUs would be compared with itself
        if "cpu" in op.kernels:
            yield pytest.param(op, "cpu", None, id=f"{op.name}-cpu")
        if "cuda" in op.kernels:
            yield pytest.param(op, "cuda", None, id=f"{op.name}-cuda", marks=[pytest.mark.gpu, NO_CUDA])
            few = SMALL_EXAMPLES.get(op.name, 16)
            yield pytest.param(op, "interpreter", few, id=f"{op.name}-interpreter", marks=INTERPRETED)
            yield pytest.param(
                op, "interpreter", None, id=f"{op.name}-interpreter-all", marks=[INTERPRETED, pytest.mark.slow]
            )


def size(example: Mapping[str, Any]) -> int:
    """Elements of all tensors of a call."""
    return sum(leaf.numel() for leaf in leaves(dict(example)))


@pytest.mark.parametrize(("op", "device", "limit"), list(cases()))
def test_kernel_agrees_with_reference(op: Op[..., Any], device: str, limit: int | None, poison: None) -> None:
    """On a GPU, and everywhere else through Triton's interpreter: on the smallest examples, or on all."""
    kernel, count = op.kernel("cuda") if device == "interpreter" else op.on(device), 0
    place = torch.device("cpu" if device == "interpreter" else device)
    made = examples(op, torch.Generator().manual_seed(1), place, device == "cpu")
    for example in made if limit is None else sorted(made, key=size)[:limit]:
        theirs, ours = dict(copy.deepcopy(example)), dict(copy.deepcopy(example))
        expected, found = op.reference(**theirs), kernel(**ours)
        if op is DECODER_LAYER and found is None:  # all is added to the residual stream already
            theirs["residual"].add_(expected)
            expected = None
        written = [(ours[name], theirs[name]) for name in op.outputs]
        for a, b in [(found, expected), *written]:
            tolerance_16bit = op.tolerance_16bit if op.tolerance else 0.0
            assert close(a, b, op.tolerance, tolerance_16bit), {k: getattr(v, "shape", v) for k, v in example.items()}
        for name in set(example) - set(op.outputs):
            assert close(ours[name], example[name], 0), f"{name} was written"
        count += 1
    assert count > 0


def test_every_op_has_a_kernel_for_a_gpu() -> None:
    """Which the interpreter and a GPU then try: an op without one would only be compared with itself."""
    assert [op.name for op in all_ops() if "cuda" not in op.kernels] == []


def test_every_op_has_examples_and_a_reason_for_its_tolerance() -> None:
    for op in all_ops():
        assert examples(op, torch.Generator(), CPU, True), op.name
        assert op.tolerance == Op("", lambda: None).tolerance or op.why, op.name


@pytest.fixture(params=["tiles", "vectors"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which unit of the CPU multiplies: the matrix unit where there is one, or the vector unit all the same."""
    if request.param == "vectors":
        monkeypatch.setattr(amx, "AVAILABLE", False)
    elif not amx.AVAILABLE:
        pytest.skip("no matrix unit")
    return str(request.param)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (67, 5), (129, 131), (1024, 48), (96, 45), (16, 1)])
def test_linear_row_does_not_depend_on_the_rows_beside_it(
    inputs: int, outputs: int, dtype: torch.dtype, unit: str, poison: None
) -> None:
    linear = LINEAR.on(CPU)
    most = 70 if unit == "tiles" and dtype == torch.bfloat16 and inputs % 32 == 0 and outputs >= 32 else 32
    x, weight = draw(most, inputs), draw(outputs, inputs, seed=1, dtype=dtype)
    alone = torch.cat([linear(row.unsqueeze(0), weight) for row in x])
    for rows in range(2, most + 1):
        assert torch.equal(linear(x[-rows:], weight), alone[-rows:]), rows
    order = torch.randperm(most, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x[order], weight), alone[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 8, 31, 33, 100, 257])
def test_linear_is_float32_at_any_height(rows: int, dtype: torch.dtype, unit: str, poison: None) -> None:
    x, weight, bias = draw(rows, 192), draw(80, 192, seed=1, dtype=dtype), draw(80, seed=2, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double()
    gap = distance(LINEAR.on(CPU)(x, weight, bias), exact.float())
    assert gap < (5e-6 if dtype == torch.bfloat16 and unit == "tiles" else 1e-6)


def attention_case(
    lengths: Iterable[tuple[int, int]],
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    seed: int = 0,
    cache: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Rows of (query tokens, all tokens), each in blocks of its own, in random order."""
    lengths = list(lengths)
    used = [-(-length // 16) for _, length in lengths]
    order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(lengths), max(used)), -1, dtype=torch.int32)
    for row, part in enumerate(order.split(used)):
        table[row, : len(part)] = part
    starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0).int()
    return {
        "query": draw(int(starts[-1]), heads[0], head_dim, seed=seed + 1),
        "key_cache": draw(sum(used), heads[1], 16, head_dim, seed=seed + 2, dtype=cache),
        "value_cache": draw(sum(used), heads[1], 16, head_dim, seed=seed + 3, dtype=cache),
        "rows": PagedRows(
            positions=torch.cat([torch.arange(length - count, length) for count, length in lengths]),
            cache_slot=torch.full((int(starts[-1]),), -1),
            block_table=table,
            query_start=starts,
            seq_lens=torch.tensor([length for _, length in lengths]).int(),
        ),
        "scale": head_dim**-0.5,
    }


CACHES = pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)


@CACHES
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("length", [17, 300, 513, 1100])
def test_attention_of_a_query_does_not_depend_on_the_others(
    length: int, heads: tuple[int, int], cache: torch.dtype, poison: None
) -> None:
    attention = PAGED_ATTENTION.on(CPU)
    case = attention_case([(9, length), (1, 40)], heads, cache=cache)
    together = attention(**case)
    for index in range(9):
        only = case["rows"]._replace(
            block_table=case["rows"].block_table[:1],
            query_start=torch.tensor([0, 1]).int(),
            seq_lens=torch.tensor([length - 8 + index]).int(),
        )
        alone = {**case, "query": case["query"][index : index + 1], "rows": only}
        assert torch.equal(attention(**alone), together[index : index + 1]), index


def move(value: Any, device: str | torch.device) -> Any:
    """A case's tensors and records of tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(move(each, device) for each in value)) if hasattr(value, "_fields") else value


EVERYWHERE = [*DEVICES, pytest.param("interpreter", marks=INTERPRETED)]


def attention_on(device: str) -> Callable[..., Tensor]:
    """The kernel that serves a device, or a GPU's through Triton's interpreter, for tensors on a CPU."""
    if device == "interpreter":
        return PAGED_ATTENTION.kernel("cuda")
    kernel = PAGED_ATTENTION.on(device)

    def attend(**case: Any) -> Tensor:
        return kernel(**{k: move(v, device) for k, v in case.items()}).to(CPU)

    return attend


@pytest.mark.parametrize("device", EVERYWHERE)
def test_attention_comparison_catches_a_mask_that_is_off_by_one(device: str) -> None:
    case = attention_case([(5, 40), (1, 513)])
    found = attention_on(device)(**case)
    assert close(found, paged_attention_reference(**case), PAGED_ATTENTION.tolerance)
    shifted = {**case, "rows": case["rows"]._replace(seq_lens=case["rows"].seq_lens - 1)}
    assert not close(found, paged_attention_reference(**shifted), 100 * PAGED_ATTENTION.tolerance)


def absurd_past_rows(case: dict[str, Any]) -> dict[str, Any]:
    """What lies in the cache after a row's last token is NaN, what lies in the table after its last block is absurd."""
    case = copy.deepcopy(case)
    table = case["rows"].block_table
    table[table < 0] = 2**31 - 1
    for row, length in enumerate(case["rows"].seq_lens.tolist()):
        if length % 16:
            block = int(table[row, length // 16])
            case["key_cache"][block, :, length % 16 :] = torch.nan
            case["value_cache"][block, :, length % 16 :] = torch.nan
    return case


@CACHES
@pytest.mark.parametrize("device", EVERYWHERE)
def test_attention_never_reads_past_a_row(device: str, cache: torch.dtype, poison: None) -> None:
    case = attention_case([(3, 21), (1, 16), (2, 530)], head_dim=128, cache=cache)
    assert torch.equal(attention_on(device)(**absurd_past_rows(case)), attention_on(device)(**case))


@pytest.mark.parametrize("device", EVERYWHERE)
def test_attention_gives_nothing_to_tokens_of_no_row(device: str, poison: None) -> None:
    """Nor is anything read for rows without tokens, which may name any length and any blocks."""
    case = attention_case([(2, 20), (1, 9), (0, 16), (0, 16)])
    case["rows"].seq_lens[2:] = torch.tensor([2**30, -5])
    case["rows"].block_table[2:] = 2**31 - 1
    expected = attention_on(device)(**case)
    padded = {**case, "query": torch.cat([case["query"], draw(4, 8, 64, seed=9)])}
    found = attention_on(device)(**padded)
    assert close(expected, paged_attention_reference(**case), PAGED_ATTENTION.tolerance)
    assert close(found[:3], expected, PAGED_ATTENTION.tolerance) and not found[3:].any()


PROMPTS = [(70, 70), (3, 200), (41, 90), (1, 1)]
DECODE = [(8, 700), (1, 40), (8, 8), (3, 17)]


@pytest.mark.parametrize("lengths", [PROMPTS, DECODE, [(1, 2100)]], ids=["prompts", "decode", "one"])
@pytest.mark.parametrize(
    "heads", [(2, 2), (2, 1), (3, 1), (4, 1), (5, 1), (8, 1)], ids=lambda heads: f"{heads[0]}to{heads[1]}"
)
@pytest.mark.parametrize("device", EVERYWHERE[1:])
def test_attention_of_a_gpu_is_exact_however_it_is_cut_up(
    device: str, heads: tuple[int, int], lengths: list[tuple[int, int]], poison: None
) -> None:
    case = absurd_past_rows(attention_case(lengths, heads, head_dim=48 if heads == (2, 2) else 64))
    assert close(attention_on(device)(**case), paged_attention_reference(**finite(case)), PAGED_ATTENTION.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("device", EVERYWHERE[1:])
def test_attention_of_a_gpu_with_every_group_of_heads(
    device: str, group: int, head_dim: int, dtype: torch.dtype, poison: None
) -> None:
    """A step that verifies, one token a row beside it, and the end of a prompt; no length is a multiple of anything."""
    lengths = [(8, 203), (1, 67), (13, 37)]
    case = attention_case(lengths, (2 * group, 2), head_dim, seed=group, cache=dtype)
    case = absurd_past_rows(case | {"query": 3 * case["query"].to(dtype)})
    expected = paged_attention_reference(**finite(case))
    assert close(attention_on(device)(**case), expected, PAGED_ATTENTION.tolerance, PAGED_ATTENTION.tolerance_16bit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("device", "lengths"),
    [
        pytest.param("cuda", [(4, 131_071), (1, 40_003), (3, 5)], marks=[pytest.mark.gpu, NO_CUDA]),
        pytest.param("interpreter", [(8, 5_001), (1, 4_099), (3, 5)], marks=INTERPRETED),
    ],
    ids=["cuda", "interpreter"],
)
def test_attention_of_a_gpu_over_a_long_context(
    device: str, lengths: list[tuple[int, int]], dtype: torch.dtype, poison: None
) -> None:
    case = attention_case(lengths, (4, 1), 128, cache=dtype)
    case = absurd_past_rows(case | {"query": 3 * case["query"].to(dtype)})
    expected = paged_attention_reference(**finite(case))
    assert close(attention_on(device)(**case), expected, PAGED_ATTENTION.tolerance, PAGED_ATTENTION.tolerance_16bit)


def finite(case: dict[str, Any]) -> dict[str, Any]:
    """The same for the reference, which multiplies what it does not see by 0."""
    return {k: v.nan_to_num() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}


@pytest.mark.parametrize("splits", [1, 3, 20])
@pytest.mark.parametrize("device", EVERYWHERE[1:])
def test_attention_of_a_gpu_shares_out_keys(device: str, splits: int, poison: None) -> None:
    """Also where a share holds no keys, or keys that only the later of the row's tokens see."""
    case = finite(attention_case([(8, 197), (2, 65), (1, 3)], (4, 2), head_dim=128))
    place = CPU if device == "interpreter" else device
    moved = {k: move(v, place) for k, v in case.items()}
    for tiles in (Tiles(16, 8, 16, 4, 2), Tiles(128, 40, 32, 8, 2, tall=True)):
        found = attend(**moved, tiles=tiles, splits=splits).to(CPU)
        assert close(found, paged_attention_reference(**case), PAGED_ATTENTION.tolerance)


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 30.0, 1e4])
def test_attention_weights_stay_finite(magnitude: float, poison: None) -> None:
    case = attention_case([(3, 70)])
    case["query"] *= magnitude
    found = PAGED_ATTENTION.on(CPU)(**case)
    assert found.isfinite().all() and close(found, paged_attention_reference(**case), 1e-4)


def layer_by_ops(  # type: ignore[no-untyped-def]
    x, residual, weights, eps, rope, rows, key_cache, value_cache, scale
) -> Tensor | None:
    stack = layers_by_ops(lambda op: op.on("cpu"), [weights], [(key_cache, value_cache)], eps, scale)
    return stack(0, 1, x, residual, rope, rows)


def test_decoder_layer_in_one_launch_equals_the_ops_it_is_made_of(unit: str, poison: None) -> None:
    for example in examples(DECODER_LAYER, torch.Generator().manual_seed(5), CPU, True):
        ours, theirs = dict(copy.deepcopy(example)), dict(copy.deepcopy(example))
        found, expected = DECODER_LAYER.on(CPU)(**ours), layer_by_ops(**theirs)
        written = [(ours[name], theirs[name]) for name in DECODER_LAYER.outputs]
        assert all(close(a, b, 0) for a, b in [(found, expected), *written])


def layer_case(lengths: Iterable[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """A layer of (query tokens, all tokens) a row; all of its products are for the matrix unit."""
    case = attention_case(lengths, (4, 2), cache=torch.bfloat16)
    rows = case["rows"]
    tokens = len(rows.positions)
    angles = draw(int(rows.seq_lens.max()), 32, seed=seed + 4)
    row = torch.arange(len(rows.seq_lens)).repeat_interleave(rows.query_start.diff())
    slot = rows.block_table[row, rows.positions // 16].long() * 16 + rows.positions % 16

    def weight(*shape: int, seed: int) -> Tensor:
        return draw(*shape, seed=seed, dtype=torch.bfloat16) * shape[-1] ** -0.5

    return {
        "x": draw(tokens, 96, seed=seed + 5),
        "residual": draw(tokens, 96, seed=seed + 6),
        "weights": LayerWeights(
            input_norm=1 + draw(96, seed=seed + 7, dtype=torch.bfloat16),
            qkv=weight(512, 96, seed=seed + 8),
            qkv_bias=draw(512, seed=seed + 9, dtype=torch.bfloat16),
            q_norm=1 + draw(64, seed=seed + 10, dtype=torch.bfloat16),
            k_norm=1 + draw(64, seed=seed + 11, dtype=torch.bfloat16),
            out=weight(96, 256, seed=seed + 12),
            post_norm=1 + draw(96, seed=seed + 13, dtype=torch.bfloat16),
            gate_up=weight(320, 96, seed=seed + 14),
            down=weight(96, 160, seed=seed + 15),
        ),
        "eps": 1e-6,
        "rope": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "rows": rows._replace(cache_slot=slot),
        "key_cache": case["key_cache"],
        "value_cache": case["value_cache"],
        "scale": 0.125,
    }


LONG = [(470, 500), (1, 20), (130, 140), (2, 600)]


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not amx.AVAILABLE, reason="elsewhere long steps go through the ops")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[(65, 65)], [(33, 70), (90, 90), (1, 520)], LONG], ids=["least", "few", "long"])
def test_a_long_step_passes_through_a_layer_in_chunks_as_it_would_whole(
    lengths: list[tuple[int, int]], threads: int, thread_count: None, poison: None
) -> None:
    torch.set_num_threads(threads)
    ours, theirs = layer_case(lengths), layer_case(lengths)
    found, expected = DECODER_LAYER.on(CPU)(**ours), layer_by_ops(**theirs)
    assert len(found) > 64, "fewer go through it together"
    written = [(ours[name], theirs[name]) for name in DECODER_LAYER.outputs]
    assert all(close(a, b, 0) for a, b in [(found, expected), *written])


@pytest.mark.parametrize("lengths", [[(1, 30)], [(1, 17), (5, 21), (2, 530)], LONG], ids=["one", "few", "long"])
def test_layers_in_one_call_equal_one_after_the_other(lengths: list[tuple[int, int]], unit: str, poison: None) -> None:
    cases = [layer_case(lengths, seed) for seed in (0, 100, 200)]
    cases[1]["weights"] = cases[1]["weights"]._replace(q_norm=None, k_norm=None)
    cases[2]["weights"] = cases[2]["weights"]._replace(qkv_bias=None)
    shared = {name: cases[0][name] for name in ("rope", "rows")}
    one = [copy.deepcopy(case) | shared for case in cases]
    x, residual = None, draw(*cases[0]["residual"].shape, seed=9)
    ours, before = residual.clone(), []
    for case in one:
        x = DECODER_LAYER.on(CPU)(**case | {"x": x, "residual": residual})
        before.append((x, residual.clone()))
    weights = [case["weights"] for case in cases]
    caches = [(case["key_cache"], case["value_cache"]) for case in cases]
    stack = DeviceLayerStack(weights, caches, 1e-6, 0.125)
    first = stack(0, 1, None, ours, **shared)
    assert torch.equal(first, before[0][0]) and torch.equal(ours, before[0][1])
    features = torch.full((len(ours), 2 * ours.shape[1]), torch.nan)
    last = stack(1, 3, first, ours, **shared, aux_layers=(2, 1), features=features)
    entering = [stream + added for added, stream in before[1::-1]]  # layer 2, then layer 1
    assert torch.equal(features, torch.cat(entering, dim=1))
    assert torch.equal(last, before[2][0]) and torch.equal(ours, before[2][1])
    features.fill_(torch.nan)
    stack(1, 3, first.clone(), before[0][1].clone(), **shared)
    assert features.isnan().all(), "a step without auxiliary layers wrote to the memory of one that did"
    for case, (keys, values) in zip(one, caches, strict=True):
        assert close(keys, case["key_cache"], 0) and close(values, case["value_cache"], 0)


def rope_case(tokens: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    cases = (dict(example) for example in examples(ROPE_STORE, generator, CPU, True))
    return next(case for case in cases if len(case["qkv"]) == tokens and case["norms"].q is not None)


@pytest.mark.parametrize("device", DEVICES)
def test_rope_store_writes_its_slots_and_nothing_else(device: str, poison: None) -> None:
    case = {k: move(v, device) for k, v in rope_case().items()}
    for name in ("key_cache", "value_cache"):
        case[name] = torch.full_like(case[name], 7.0)
    case["rows"] = case["rows"]._replace(cache_slot=torch.tensor([33, -1, 0, -1, 79], device=device))
    ROPE_STORE.on(device)(**case)
    for name in ("key_cache", "value_cache"):
        by_slot = case[name].transpose(1, 2).flatten(0, 1)  # [slots, Hkv, D]
        written = (by_slot != 7.0).flatten(1).any(1).nonzero().flatten().tolist()
        assert written == [0, 33, 79]


def test_keys_and_values_are_rounded_to_bfloat16_as_torch_rounds(poison: None) -> None:
    """Halves go to the even neighbour; subnormals stay. Of a head with a value too large, or none, nothing is kept."""
    top = torch.arange(0x0000, 0x7F80, 61, dtype=torch.int32).repeat_interleave(6) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32).repeat(len(top) // 6)
    values = (top | low).view(torch.float32)
    values = torch.cat([torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38]), values, -values])
    rows = values[: len(values) // 128 * 128].view(-1, 2, 64)
    tokens, blocks = len(rows), -(-len(rows) // 16)
    case = rope_case()
    case |= {name: torch.empty(blocks, 2, 16, 64, dtype=torch.bfloat16) for name in ("key_cache", "value_cache")}
    case |= {"qkv": torch.cat([rows, rows, rows], 1).flatten(1), "rope": torch.tensor([[1.0] * 32 + [0.0] * 32])}
    positions, slots = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
    case["rows"] = case["rows"]._replace(positions=positions, cache_slot=slots)
    ROPE_STORE.on(CPU)(**case | {"norms": HeadNorms(None, None, 1e-6)})
    values, keys = (case[name].transpose(1, 2).flatten(0, 1)[:tokens] for name in ("value_cache", "key_cache"))
    rounded = rows.bfloat16()
    is_kept = rounded.isfinite().all(-1, keepdim=True)
    assert is_kept.any() and not is_kept.all()
    assert close(values, torch.where(is_kept, rounded, 0), 0)
    assert close(keys, torch.where(is_kept, rounded, torch.nan), 0)


def test_a_layer_in_float32_is_good_to_float32(poison: None) -> None:
    """The op's own tolerance leaves room for keys and values that are rounded."""
    for example in examples(DECODER_LAYER, torch.Generator().manual_seed(7), CPU, True):
        if example["key_cache"].dtype == torch.float32:
            ours, theirs = dict(copy.deepcopy(example)), dict(copy.deepcopy(example))
            found, expected = DECODER_LAYER.on(CPU)(**ours), DECODER_LAYER.reference(**theirs)
            written = [(ours[name], theirs[name]) for name in DECODER_LAYER.outputs]
            assert all(close(a, b, 2e-6) for a, b in [(found, expected), *written])


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norms_use_eps(eps: float, poison: None) -> None:
    x, weight = 1e-2 * draw(3, 67), draw(67, seed=1)
    exact = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    assert distance(RMS_NORM.on(CPU)(x, weight, eps), exact) < 1e-6
    residual, sum_ = draw(3, 67, seed=2), draw(3, 67, seed=2) + x
    ADD_RMS_NORM.on(CPU)(x, residual, weight, eps)
    assert torch.equal(residual, sum_)


def test_kernels_may_run_in_several_threads_at_once() -> None:
    case, x, weight = attention_case([(1, 700)]), draw(4, 1024), draw(4096, 1024, seed=1, dtype=torch.bfloat16)
    linear, attention = LINEAR.on(CPU), PAGED_ATTENTION.on(CPU)
    expected, wrong = (linear(x, weight), attention(**case)), []

    def work() -> None:
        for _ in range(100):
            if not (torch.equal(linear(x, weight), expected[0]) and torch.equal(attention(**case), expected[1])):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    case, x = attention_case([(1, 1500), (20, 90)]), draw(5, 300)
    weight, found = draw(777, 300, seed=1, dtype=torch.bfloat16), []
    for count in (1, 2, 5):
        threads(count)
        found.append((LINEAR.on(CPU)(x, weight), PAGED_ATTENTION.on(CPU)(**case)))
    assert all(close(each, found[0], 0) for each in found)


FORKED = """
import os, torch
from outrider.kernels.linear import LINEAR
x, weight = torch.randn(2, 512), torch.randn(4096, 512).bfloat16()
expected = LINEAR.on("cpu")(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(LINEAR.on("cpu")(x, weight), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_and_the_interpreters_end_are_survived() -> None:
    """A child has no helper threads, and an exit must not take code away from under running ones."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


SHARED_MEMORY = {90: 227 << 10, 86: 99 << 10}
"""Bytes that a program may have on a GPU, by its compute capability."""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_gpu_kernels_compile_without_a_gpu(tmp_path: Path, capability: int) -> None:
    """In a process of its own: in this one Triton interprets, and takes what its compiler does not."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "compile_kernels.py"
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, str(capability)], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    wanted = {"_attention_kernel", "_rope_attention_kernel", "_assemble_kernel", "_best_of_row_kernel"}
    assert "_few_rows_kernel" in shared and (capability != 90 or wanted <= set(shared))
    assert all(int(size) <= SHARED_MEMORY[capability] for size in shared.values())
