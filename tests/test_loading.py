"""Every weight of a checkpoint arrives in its place, in its own type, and none is made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import Case, parameters, program, reference, run, write, write_tokenizer
from outrider import LLM, CheckpointError
from outrider.layers.weight import WeightSlot, WeightSlots, dense_tensor
from outrider.load import checkpoint
from outrider.load.hub import FILES, locate
from outrider.models.decoder import Decoder

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-sharded": ("qwen3", {"shards": "30KB"}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            family, config = CONFIGS[name]
            path = tmp_path_factory.mktemp(name)
            made[name, dtype] = write_tokenizer(write(path, family, dtype=DTYPES[dtype], **config))
        return made[name, dtype]

    return make


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of the files."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def open_model(path: Path, **options: Any) -> Decoder:
    with LLM(str(path), max_model_len=64, **options) as llm:
        return program(llm)._model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_names_values_types_and_bytes(saved: Callable[..., Path], name: str, dtype: str) -> None:
    path = saved(name, dtype)
    files = stored(path)
    seen: list[tuple[int, int]] = []
    with LLM(str(path), max_model_len=64, progress=lambda done, total: seen.append((done, total))) as llm:
        model, memory = program(llm)._model, llm.engine.resolved.runner.memory
    weights = parameters(model)
    assert weights.keys() == files.keys()
    for key, weight in weights.items():
        assert weight.dtype == files[key].dtype == DTYPES[dtype]
        assert torch.equal(weight, files[key]), key
    size = sum(tensor.nbytes for tensor in files.values())
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    assert sum(storages.values()) == size == memory.weights, "held twice, widened, or planned for wrongly"
    assert model.num_parameters == sum(tensor.numel() for tensor in files.values())
    assert [total for _, total in seen] == [size] * len(files) and seen[-1][0] == size
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_casting(saved: Callable[..., Path], dtype: str, to: str) -> None:
    path = saved("qwen3", dtype)
    weights = parameters(open_model(path, dtype=to))
    for key, tensor in stored(path).items():
        assert weights[key].dtype == DTYPES[to] and torch.equal(weights[key], tensor.to(DTYPES[to]))


def test_files_of_another_type_than_the_config_says(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "mixed")
    tensors = stored(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    save_file(tensors, path / "model.safetensors")
    weights = parameters(open_model(path))
    assert all(weight.dtype == torch.float32 for weight in weights.values())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tied_heads_are_one_matrix(saved: Callable[..., Path], family: str, tmp_path: Path) -> None:
    model = open_model(saved(f"{family}-tied"))
    assert model.head.weight is model.embedding.weight and "lm_head.weight" not in model.slots()
    model = open_model(saved(family))
    assert model.head.weight is not model.embedding.weight and "lm_head.weight" in model.slots()
    # a copy of the tied head in the files is known, and not read
    path = write(tmp_path / "copied", family, tie_word_embeddings=True)
    tensors = stored(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    model = open_model(path)
    assert torch.equal(dense_tensor(model.head.weight), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_names_without_their_prefix(family: str, is_tied: bool, tmp_path: Path) -> None:
    path = write(tmp_path, family, tie_word_embeddings=is_tied)
    expected = parameters(open_model(path))
    save_file({name.removeprefix("model."): held for name, held in stored(path).items()}, path / "model.safetensors")
    assert_same(parameters(open_model(path)), expected)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tied_matrix_held_as_the_head_s_alone(prefix: str, tmp_path: Path) -> None:
    path = write(tmp_path, tie_word_embeddings=True)
    expected = parameters(open_model(path))
    tensors = {prefix + name.removeprefix("model."): held for name, held in stored(path).items()}
    tensors["lm_head.weight"] = tensors.pop(f"{prefix}embed_tokens.weight")
    save_file(tensors, path / "model.safetensors")
    assert_same(parameters(open_model(path)), expected)


def test_a_name_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    tensors = stored(path)
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"].clone()}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight twice"):
        open_model(path)


def test_a_tied_head_that_is_another_matrix_is_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, tie_word_embeddings=True)
    for change, is_said in ((0.0, False), (1.0, True)):
        tensors = stored(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        save_file(tensors, path / "model.safetensors")
        caplog.clear()
        head = dense_tensor(open_model(path).head.weight)
        assert torch.equal(head, tensors["lm_head.weight"])
        assert torch.equal(head, reference(path).lm_head.weight), "transformers has it too"
        assert any("ties head and embedding" in record.getMessage() for record in caplog.records) == is_said


def test_a_whole_file_beside_shards_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, shards="40KB")
    single = write(tmp_path / "single")
    tensors = {name: held + 1.0 for name, held in stored(single).items()}
    save_file(tensors, path / "model.safetensors")
    assert torch.equal(parameters(open_model(path))["model.norm.weight"], tensors["model.norm.weight"])
    assert any("model.safetensors is taken" in record.getMessage() for record in caplog.records)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def assert_no_nan(model: Decoder) -> None:
    for weight in parameters(model).values():
        assert not weight.isnan().any(), "a parameter was not filled"


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_stays_as_it_was_made(saved: Callable[..., Path], name: str) -> None:
    assert_no_nan(open_model(saved(name)))


def test_a_skipped_tensor_would_show(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fill = checkpoint._fill

    def skip(slot: WeightSlot, tensor: Tensor, name: str, file: Path) -> None:
        if name != "model.layers.1.self_attn.k_proj.weight":
            fill(slot, tensor, name, file)

    monkeypatch.setattr(checkpoint, "_fill", skip)
    with pytest.raises(AssertionError, match="was not filled"):
        assert_no_nan(open_model(saved("qwen3")))


def test_swapped_parts_would_show(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved("qwen3")
    (case,) = cases = [Case.of(9, 1, temperature=0.0)]
    with LLM(str(path), max_model_len=64) as llm:
        expected = run(llm, cases)
    whole = Decoder.slots

    def swapped(self: Decoder) -> WeightSlots:
        weights = whole(self)
        gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
        weights[gate], weights[up] = weights[up], weights[gate]
        return weights

    monkeypatch.setattr(Decoder, "slots", swapped)
    with LLM(str(path), max_model_len=64) as llm:
        assert run(llm, [case]) != expected


def test_dummy_weights_need_no_files(tmp_path: Path) -> None:
    path = write(tmp_path / "config-only")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing weight file"):
        LLM(str(path))
    cases = [Case.of(9, 1)]
    with LLM(str(path), max_model_len=64, load_format="dummy") as llm:
        assert_no_nan(program(llm)._model)
        first = run(llm, cases)
        weights = parameters(program(llm)._model)
    with LLM(str(path), max_model_len=64, load_format="dummy") as llm:
        assert run(llm, cases) == first, "the same seed draws the same weights"
    other = parameters(open_model(path, load_format="dummy", seed=1))
    assert not torch.equal(weights["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert all(bool((weight == 1).all()) for name, weight in weights.items() if name.endswith("norm.weight"))


# The hub.


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error in (LocalEntryNotFoundError("cannot reach it\nand more"), ConnectionError("cannot reach it")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=r"cannot fetch owner/name from .* hub: cannot reach it$"):
            LLM("owner/name")


def test_a_hub_id_is_downloaded_and_served(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    path = saved("qwen3")

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with LLM("owner/name", max_model_len=64) as llm:
        assert llm.engine.resolved.directory == path
    assert asked == [("owner/name", list(FILES))]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in FILES), "neither pickles nor code"


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "~/nowhere", "a/b/c", "../a"])
def test_no_such_directory_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match=r"no model directory: .*give a local directory or a Hugging Face id"):
        locate(name)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"no model directory: .*model\.gguf"):
        locate(str(tmp_path / "model.gguf"))
