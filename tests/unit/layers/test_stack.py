"""Layers from their specs: which backend runs them and why, and that a range of them can be run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from checkpoints import Case, program, reference, run, write, write_tokenizer
from heads import write_head
from outrider import LLM
from outrider.cache.layout import CacheLayout, LayerCache
from outrider.cli.main import app
from outrider.config import resolve
from outrider.layers.backend import BACKENDS, ByOps, FusedCpu, choose_backend, declines
from outrider.layers.mlp import GatedMlpSpec
from outrider.layers.parameter import Allocator, dense
from outrider.layers.rope import Rope
from outrider.layers.spec import AttentionSpec, LayerFeature, LayerSpec
from outrider.layers.stack import DecoderStack
from outrider.layers.weight import Dense
from outrider.options import EngineOptions
from outrider.tensors import PagedRows, StepBatch

CPU = torch.device("cpu")
PLAIN = LayerSpec(48, 1e-6, AttentionSpec(4, 2, 16, qk_norm=True), GatedMlpSpec(80))
OUT_BIAS = replace(PLAIN, attention=replace(PLAIN.attention, qkv_bias=True, out_bias=True))
MLP_BIAS = replace(PLAIN, mlp=GatedMlpSpec(80, bias=True))
LENGTH = 23


class OtherMlp:
    """A spec of an MLP that no fused kernel knows."""

    build = GatedMlpSpec(80).build


class Relu(GatedMlpSpec):
    """A subclass with an activation of its own, say."""


@pytest.mark.parametrize(
    ("spec", "needed"),
    [
        (PLAIN, []),
        (replace(PLAIN, attention=replace(PLAIN.attention, qkv_bias=True, qk_norm=False)), []),
        (OUT_BIAS, [("attention", LayerFeature.OUT_BIAS)]),
        (MLP_BIAS, [("mlp", LayerFeature.MLP_BIAS)]),
        (replace(PLAIN, mlp=OtherMlp()), [("OtherMlp", LayerFeature.OTHER_MLP)]),
        (replace(PLAIN, mlp=Relu(80)), [("Relu", LayerFeature.OTHER_MLP)]),
    ],
    ids=["plain", "qkv-bias", "out-bias", "mlp-bias", "other-mlp", "subclass"],
)
def test_a_fused_backend_declines_what_its_kernel_lacks(
    spec: LayerSpec, needed: list[tuple[str, LayerFeature]]
) -> None:
    choice = choose_backend([PLAIN, spec], CPU)
    assert [(gap.part, gap.feature) for _, gap in choice.passed_over] == needed
    assert choice.backend is (ByOps if needed else FusedCpu)
    assert not declines(ByOps, [spec], CPU)


def test_an_allocator_of_another_form_is_not_fused() -> None:
    def other(parts: Sequence[int], inputs: int, allocator: Allocator) -> Dense:
        return dense(parts, inputs, allocator)

    made = DecoderStack([PLAIN], replace(Allocator.on(CPU, torch.float32), form=other))
    assert made.choice.backend is ByOps
    assert DecoderStack([PLAIN], Allocator.on(CPU, torch.float32)).choice.backend is FusedCpu


def test_every_fused_backend_has_a_reason_for_every_feature() -> None:
    for backend in BACKENDS:
        assert set(backend.lacks) == (set() if backend is ByOps else set(LayerFeature))


def test_a_device_without_the_kernel_is_a_reason_too() -> None:
    (gap,) = declines(FusedCpu, [PLAIN], torch.device("meta"))
    assert "fused_cpu has no kernel" in str(gap)


def draw(stack: DecoderStack) -> None:
    """Random parameters, large enough that each layer matters."""
    generator = torch.Generator().manual_seed(0)
    for slot in stack.slots("").values():
        slot.fill(0.2 * torch.randn(tuple(slot.shape), generator=generator))


def _step() -> StepBatch:
    """One prompt of LENGTH tokens, at the start of its own blocks."""
    positions, whole = torch.arange(LENGTH), torch.zeros(1, dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int64)
    return StepBatch(
        slot=none,
        input_ids=positions,
        rows=PagedRows(
            positions=positions,
            cache_slot=positions,
            block_table=torch.tensor([[0, 1]], dtype=torch.int32),
            query_start=torch.tensor([0, LENGTH], dtype=torch.int32),
            seq_lens=torch.tensor([LENGTH], dtype=torch.int32),
        ),
        num_drafts=whole,
        draft_tokens=none[:, None],
        logits_start=whole,
        logits_index=none,
        logits_slot=none,
        logits_position=none,
    )


def _cut(stack: DecoderStack, cuts: list[int]) -> tuple[Tensor, list[LayerCache], Tensor]:
    """The stream after all layers, run in pieces; the cache; and what enters layers 2 and 1."""
    cache = CacheLayout(len(stack), 2, 16, 16, torch.float32).allocate(2, CPU)
    for each in cache:
        each.key.zero_(), each.value.zero_()
    residual = torch.randn(LENGTH, 48, generator=torch.Generator().manual_seed(1))
    features, rope = torch.empty(LENGTH, 2 * 48), Rope().table(64, 16, CPU)
    x = None
    for first, last in zip([0, *cuts], [*cuts, len(stack)], strict=True):
        x = stack.run(x, residual, _step(), rope, cache, (2, 1), features, first, last)
    return residual if x is None else residual + x, cache, features


@pytest.mark.parametrize("spec", [PLAIN, OUT_BIAS], ids=["fused", "by-ops"])
def test_a_range_of_layers_can_be_run(spec: LayerSpec) -> None:
    stack = DecoderStack([spec] * 4, Allocator.on(CPU, torch.float32))
    draw(stack)
    whole, cache, features = _cut(stack, [])
    for cuts in ([2], [1, 3], [1, 2, 3]):
        found, own_cache, own_features = _cut(stack, cuts)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own_features, features, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close([one.key for one in own_cache], [one.key for one in cache], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(_cut(stack, [2])[0], stack_without_the_last(stack), atol=1e-2)


def stack_without_the_last(stack: DecoderStack) -> Tensor:
    """The stream that enters the last layer: what a cut that loses a layer would give."""
    cache = CacheLayout(len(stack), 2, 16, 16, torch.float32).allocate(2, CPU)
    residual = torch.randn(LENGTH, 48, generator=torch.Generator().manual_seed(1))
    x = stack.run(None, residual, _step(), Rope().table(64, 16, CPU), cache, first=0, last=len(stack) - 1)
    return residual if x is None else residual + x


def test_layers_of_two_shapes_run_fused_in_one_stack() -> None:
    wide = replace(PLAIN, mlp=GatedMlpSpec(96))
    stack = DecoderStack([PLAIN, PLAIN, wide, wide], Allocator.on(CPU, torch.float32))
    draw(stack)
    assert stack.choice.backend is FusedCpu
    fused, _, features = _cut(stack, [3])
    stack.choice, stack._bound = replace(stack.choice, backend=ByOps), None
    by_ops, _, own_features = _cut(stack, [])
    torch.testing.assert_close(fused, by_ops, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, own_features, rtol=1e-4, atol=1e-4)


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    return write_tokenizer(write(tmp_path / "biased", "llama", attention_bias=True, mlp_bias=True))


def test_biases_run_by_ops_with_the_reason_said(biased: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "outrider"), LLM(str(biased), max_model_len=64) as llm:
        layers = llm.choice.layers
        assert layers is not None and layers.backend is ByOps
        assert {gap.feature for _, gap in layers.passed_over} == {LayerFeature.OUT_BIAS, LayerFeature.MLP_BIAS}
        model = program(llm)._model
        found = run(llm, [Case.of(20, temperature=0.0)])[0][0][0]
    assert all(layer.attention.out.bias is not None for layer in model.layers)
    assert "layers of the model run by_ops, not fused_cpu: attention needs out_bias" in caplog.text
    given = torch.tensor([list(Case.of(20).prompt)])
    theirs = reference(biased, "llama").generate(given, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    assert found == theirs[0, 20:].tolist()


def explain(*arguments: str) -> str:
    """What `outrider explain` prints, on a CPU."""
    return CliRunner().invoke(app, ["explain", *arguments, "--device", "cpu"], catch_exceptions=False).stdout


def test_explain_says_it(biased: Path, tiny: Callable[..., Path]) -> None:
    layers = json.loads(explain(str(biased), "--json"))["layers"]
    assert layers["backend"] == "by_ops" and len(layers["passed_over"]) == 2
    assert {each["feature"] for each in layers["passed_over"]} == {"out_bias", "mlp_bias"}
    assert all(each["backend"] == "fused_cpu" and each["reason"] for each in layers["passed_over"])
    out = explain(str(biased))
    assert "layers by_ops" in out and "not fused_cpu: attention needs out_bias" in out
    found = json.loads(explain(str(tiny("qwen3")), "--json"))
    assert found["layers"]["backend"] == "fused_cpu" and found["draft_layers"] is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_draft_head_says_it_too(bias: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", True, layer={"attention_bias": bias})
    found = json.loads(explain(str(tiny("qwen3")), "--draft", str(head), "--json"))
    assert found["layers"]["backend"] == "fused_cpu"
    assert found["draft_layers"]["backend"] == ("by_ops" if bias else "fused_cpu")
    assert [each["feature"] for each in found["draft_layers"]["passed_over"]] == ["out_bias"] * bias


def test_resolving_chooses_without_loading(biased: Path) -> None:
    (biased / "model.safetensors").unlink()
    layers = resolve(EngineOptions(model=str(biased), device="cpu")).served_by().layers
    assert layers is not None and layers.backend is ByOps
