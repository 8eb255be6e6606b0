"""A model family of a user's own, and a form of weights of a test's own, each in one file and with no line for it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from checkpoints import SIZES, Case, program, run, write
from outrider import LLM, CheckpointError, OptionError, UnknownArchitectureError
from outrider.bench.floors import Reads
from outrider.cli.main import app
from outrider.layers.weight import check_shape
from outrider.modelling import Allocator, LayerSpec, ModelConfig, WeightSlot
from outrider.models.llama import Llama

ROOT = Path(__file__).parents[3]
OWN, INT8 = "my_model:SquaredReluLlama", "test_own_model:Int8Llama"


class SquaredRelu(nn.Module):
    """The example's MLP, in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(SIZES["hidden_size"], SIZES["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(SIZES["intermediate_size"], SIZES["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(torch.relu(self.up_proj(x)) ** 2)
        return down


def rename(path: Path, **config: Any) -> None:
    """Writes entries of a config.json anew."""
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | config))


@pytest.fixture
def reference(tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    """A checkpoint, and its model in transformers with that MLP in every layer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    for layer in model.model.layers:
        layer.mlp = SquaredRelu()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(tmp_path / "own")
    rename(tmp_path / "own", architectures=["SquaredReluForCausalLM"], hidden_act="relu2")
    return tmp_path / "own", model.eval()


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setitem(sys.modules, "test_own_model", sys.modules[__name__])
    assert importlib.util.find_spec("my_model") is not None


def greedy(path: Path, model_class: str) -> list[int]:
    with LLM(str(path), max_model_len=64, model_class=model_class) as llm:
        return run(llm, [Case.of(20, temperature=0.0)])[0][0][0]


def test_a_family_of_ones_own_is_that_of_torch(reference: tuple[Path, LlamaForCausalLM]) -> None:
    path, model = reference
    given = torch.tensor([list(Case.of(20).prompt)])
    expected = model.generate(given, max_new_tokens=24, do_sample=False)[0, 20:].tolist()  # type: ignore[operator]
    assert greedy(path, OWN) == expected
    model.model.layers[1].mlp.down_proj.weight.data.neg_()  # the comparison would notice
    assert model.generate(given, max_new_tokens=24, do_sample=False)[0, 20:].tolist() != expected  # type: ignore[operator]


def test_explain_says_what_runs_it(reference: tuple[Path, LlamaForCausalLM]) -> None:
    path, _ = reference
    flags = ["--model-class", OWN, "--device", "cpu", "--json"]
    layers = json.loads(CliRunner().invoke(app, ["explain", str(path), *flags]).stdout)["layers"]
    assert layers["backend"] == "by_ops"
    (reason,) = layers["passed_over"]
    assert (reason["part"], reason["feature"]) == ("SquaredReluSpec", "other_mlp") and "gated MLP" in reason["reason"]


def test_a_class_that_does_not_fit_is_refused(reference: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    path, _ = reference
    with pytest.raises(UnknownArchitectureError, match=r"SquaredReluForCausalLM .*model_class"):
        LLM(str(path))
    with pytest.raises(OptionError, match=r"is for SquaredReluForCausalLM, the checkpoint is LlamaForCausalLM"):
        LLM(str(write(tmp_path / "llama", "llama")), model_class=OWN)
    with pytest.raises(OptionError, match=r"must be a subclass of outrider.modelling.Decoder"):
        LLM(str(path), model_class="my_model:SquaredRelu")
    with pytest.raises(OptionError, match="names no class"):
        LLM(str(path), model_class="my_model")


class Int8:
    """A matrix in int8 with a scale a row, widened when it is multiplied."""

    def __init__(self, parts: Sequence[int], inputs: int, allocator: Allocator) -> None:
        outputs = sum(parts)
        self.numbers = torch.zeros(outputs, inputs, dtype=torch.int8, device=allocator.device)
        self.scale = torch.full((outputs, 1), torch.nan, device=allocator.device)
        self.shape = (outputs, inputs)

    def slots(self, first: int, last: int) -> Mapping[str, WeightSlot]:
        return {"weight": Exact(self.numbers[first:last]), "weight_scale": Exact(self.scale[first:last])}

    def multiply(self, x: Tensor, bias: Tensor | None = None, upcast: bool = False) -> Tensor:
        return nn.functional.linear(x, self.numbers * self.scale, bias)


class Exact:
    """Takes what the checkpoint has, in its own type."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape
        self.nbytes = self.nbytes_read = tensor.nbytes

    def fill(self, tensor: Tensor) -> None:
        check_shape(self, tensor)
        assert tensor.dtype == self.tensor.dtype
        self.tensor.copy_(tensor)

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.tensor.fill_(1)


class Int8Llama(Llama):
    """A Llama whose layers have such matrices."""

    architecture: ClassVar[str] = "Int8ForCausalLM"

    @classmethod
    def layer_specs(cls, config: ModelConfig) -> list[LayerSpec]:
        return [replace(spec, form=Int8) for spec in super().layer_specs(config)]


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in int8, and one of the numbers that it stands for."""
    path, dense = (write(tmp_path / name, "llama", tie_word_embeddings=False) for name in ("int8", "dense"))
    tensors, widened = load_file(path / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        widened[name] = tensor
        if "proj" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name], tensors[f"{name}_scale"] = (tensor / scale).round().to(torch.int8), scale
            widened[name] = tensors[name] * scale
    save_file(tensors, path / "model.safetensors")
    save_file(widened, dense / "model.safetensors")
    rename(path, architectures=["Int8ForCausalLM"])
    return path, dense


def test_another_form_of_weights_needs_no_line(quantised: tuple[Path, Path]) -> None:
    path, dense = quantised
    tensors = load_file(path / "model.safetensors")
    with LLM(str(dense), max_model_len=64) as llm:
        expected = run(llm, [Case.of(20, temperature=0.0)])[0][0][0]
    with LLM(str(path), max_model_len=64, model_class=INT8) as llm:
        resolved, choice = llm.engine.resolved, llm.choice.layers
        assert run(llm, [Case.of(20, temperature=0.0)])[0][0][0] == expected
        assert program(llm)._model.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert choice is not None and [gap.feature.name for _, gap in choice.passed_over] == ["OTHER_WEIGHTS"]
    held = sum(tensor.nbytes for tensor in tensors.values())
    embedding = tensors["model.embed_tokens.weight"].nbytes
    assert resolved.runner.memory.weights == held and Reads.of(resolved).target == held - embedding
    with LLM(str(path), max_model_len=64, model_class=INT8, load_format="dummy") as llm:
        assert len(run(llm, [Case.of(20)])[0][0][0]) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_proj.weight_scale": None}, r"lacks model.layers.1.self_attn.k_proj.weight_scale"),
        ({"k_proj.weight_zeros": torch.ones(3)}, r"does not have: model.layers.1.self_attn.k_proj.weight_zeros"),
        ({"k_proj.weight_scale": torch.ones(3)}, r"k_proj.weight_scale in .* has shape \[3\], the config promises"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_every_name_of_another_form_is_accounted_for(
    quantised: tuple[Path, Path], change: dict[str, Tensor | None], message: str
) -> None:
    path, _ = quantised
    tensors: dict[str, Tensor | None] = dict(load_file(path / "model.safetensors"))
    tensors |= {f"model.layers.1.self_attn.{name}": tensor for name, tensor in change.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        LLM(str(path), max_model_len=64, model_class=INT8)
