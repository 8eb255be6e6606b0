"""Checkpoints with something wrong: refused before the first token, naming the file, the name or the value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write, write_tokenizer
from outrider import LLM, CheckpointError, PromptError, UnknownArchitectureError
from outrider.load.checkpoint import TensorFile
from outrider.load.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    made = {
        sharded: write(tmp_path_factory.mktemp("whole"), shards="60KB" if sharded else "1GB")
        for sharded in (False, True)
    }
    return made.__getitem__


@pytest.fixture
def single(whole: Callable[[bool], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole(False), tmp_path / "single"))


@pytest.fixture
def sharded(whole: Callable[[bool], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole(True), tmp_path / "sharded"))


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Changes the tensors of a file."""

    def spoil(path: Path) -> None:
        tensors = load_file(path / SINGLE)
        change(tensors)
        save_file(tensors, path / SINGLE)

    return spoil


def cut(share: float) -> Spoil:
    def spoil(path: Path) -> None:
        data = (path / SINGLE).read_bytes()
        (path / SINGLE).write_bytes(data[: int(len(data) * share)])

    return spoil


K_PROJ, NORM = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda path: (path / SINGLE).unlink(), f"missing weight file: .*{SINGLE}"),
    "empty": (lambda path: (path / SINGLE).write_bytes(b""), f"cannot read .*{SINGLE}.*is it complete"),
    "half": (cut(0.5), f"cannot read .*{SINGLE}.*is it complete"),
    "header-only": (cut(0.002), f"cannot read .*{SINGLE}.*is it complete"),
    "garbage": (lambda path: (path / SINGLE).write_bytes(b"\xff" * 5000), f"cannot read .*{SINGLE}"),
    "directory": (lambda path: [(path / SINGLE).unlink(), (path / SINGLE).mkdir()], f"cannot read .*{SINGLE}"),
    "lacking": (edit(lambda tensors: (tensors.pop(K_PROJ), tensors.pop(NORM))), f"lacks {K_PROJ}, {NORM}"),
    "unexpected": (
        edit(lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)})),
        r"weights the model does not have: model\.extra\.weight",
    ),
    "renamed": (edit(lambda tensors: tensors.update({"norm": tensors.pop(NORM)})), f"lacks {NORM} and holds .*: norm"),
    "wide": (
        edit(lambda tensors: tensors.update({NORM: torch.ones(49)})),
        rf"{NORM} in .* has shape \[49\], the config promises \[48\]",
    ),
    "turned": (
        edit(lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].T.contiguous()})),
        rf"{K_PROJ} in .* has shape \[48, 32\], the config promises \[32, 48\]",
    ),
    "scalar": (edit(lambda tensors: tensors.update({NORM: torch.tensor(1.0)})), rf"{NORM} in .* has shape \[\]"),
    "whole-numbers": (
        edit(lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int8)})),
        f"{NORM} in .* is torch.int8: quantised weights are not supported",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_weights(single: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(single)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(single), max_model_len=64)


def test_a_pickled_checkpoint_says_what_to_do(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"convert pytorch_model\.bin to safetensors"):
        LLM(str(single), max_model_len=64)


def test_many_names_are_counted(single: Path) -> None:
    edit(lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])(single)
    with pytest.raises(CheckpointError, match="and 14 more"):
        LLM(str(single), max_model_len=64)


SPOILT_SHARDS: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda path: next(path.glob("model-00002*")).unlink(), r"missing weight file: .*model-00002-of"),
    "no-map": (lambda path: (path / INDEX).write_text("{}"), "missing weight file"),
    "broken-index": (lambda path: (path / INDEX).write_text("{"), f"cannot read .*{INDEX}"),
    "list-index": (lambda path: (path / INDEX).write_text("[]"), f"not a JSON object: .*{INDEX}"),
    "map-of-numbers": (lambda path: (path / INDEX).write_text('{"weight_map": {"a": 1}}'), INDEX),
    "map-is-text": (lambda path: (path / INDEX).write_text('{"weight_map": "x"}'), INDEX),
    **{
        f"a file elsewhere, {file}": (
            lambda path, file=file: (path / INDEX).write_text(json.dumps({"weight_map": {"a": file}})),
            rf"{INDEX}: weight_map must map names to \.safetensors files beside it, and a is in ",
        )
        for file in ("/etc/passwd", "/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "config.json", "", 5)
    },
}


@pytest.mark.parametrize("name", SPOILT_SHARDS)
def test_spoilt_shards(sharded: Path, name: str) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    spoil, message = SPOILT_SHARDS[name]
    spoil(sharded)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(sharded), max_model_len=64)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"no-{key}": ({key: None}, f"config.json lacks {key}")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    },
    "no-positions": ({"max_position_embeddings": None}, "lacks max_position_embeddings"),
    "no-architecture": ({"architectures": None}, r"must name one model: \[\]"),
    "two-architectures": ({"architectures": ["A", "B"]}, r"must name one model: \['A', 'B'\]"),
    "sliding-window": ({"use_sliding_window": True}, "sliding-window attention is not supported"),
    "window": (
        {"sliding_window": 8, "use_sliding_window": None, "layer_types": None},
        "sliding_window 8 is not supported",
    ),
    "sliding-layer": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised weights are not supported: awq"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is not supported: gelu"),
    "dtype": ({"dtype": "float64"}, "dtype is not supported: float64"),
    "rope": ({"rope_parameters": {"rope_type": "mrope"}}, r"json: rope_parameters\.rope_type is not supported: mrope"),
    "rope-key": ({"rope_parameters": {"rope_type": "linear"}}, r"lacks rope_parameters\.factor"),
    "text-for-number": ({"hidden_size": "wide"}, "hidden_size.*wide"),
    "list-for-number": ({"num_hidden_layers": [2]}, r"num_hidden_layers.*\[2\]"),
    "no-layers": ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
    "negative": ({"intermediate_size": -80}, "intermediate_size.*-80"),
    "uneven-heads": ({"num_key_value_heads": 3}, "num_key_value_heads.*3"),
    "odd-head": ({"head_dim": 15}, "head_dim.*15"),
}


def configure(path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(single: Path, name: str) -> None:
    changes, message = CONFIGS[name]
    configure(single, changes)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(single), max_model_len=64, load_format="dummy")  # no weights whose shapes could tell


@pytest.mark.parametrize(
    ("given", "nearest"), [("Qwen3ForCausalML", "did you mean Qwen3ForCausalLM"), ("X", "known: ")]
)
def test_an_unknown_architecture(single: Path, given: str, nearest: str) -> None:
    configure(single, {"architectures": [given]})
    with pytest.raises(UnknownArchitectureError, match=f"config.json: architecture is not .*: {given} .*{nearest}"):
        LLM(str(single))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "missing file"), ("{", "cannot read"), ("[]", "not a JSON object"), ("\udcff", "cannot read")],
)
def test_a_config_that_is_none(single: Path, text: str | None, message: str) -> None:
    file = single / "config.json"
    file.unlink() if text is None else file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"{message}.*config\.json"):
        LLM(str(single))


@pytest.mark.parametrize("data", [b"\xff\xfe{\x00}\x00", b'{"a": "\xe9"}'])
def test_json_that_is_no_utf_8(single: Path, data: bytes) -> None:
    (single / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: no UTF-8 from byte \d+ on"):
        LLM(str(single))


@pytest.mark.parametrize("value", [5, [["x"]], {"a": 1}, "x"], ids=str)
@pytest.mark.parametrize("key", ["model", "decoder", "added_tokens", "normalizer", "pre_tokenizer"])
def test_a_damaged_tokenizer_is_refused(single: Path, key: str, value: Any) -> None:
    write_tokenizer(single)
    file = single / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*are its files complete"):
        Tokenizer(single)


def test_a_class_that_is_no_tokenizer_is_refused(single: Path) -> None:
    write_tokenizer(single)
    file = single / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Qwen3ForCausalLM"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_class names Qwen3ForCausalLM, which is no tokenizer"):
        Tokenizer(single)


def test_a_text_that_a_tokenizer_cannot_encode_is_refused(single: Path) -> None:
    write_tokenizer(single)
    file = single / "tokenizer.json"
    unigram = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": unigram, "pre_tokenizer": None}))
    with LLM(str(single), max_model_len=64) as llm:
        with pytest.raises(PromptError, match=r"cannot encode the text.*unk_id.*give token ids"):
            llm.generate("b")
        for limit in (None, 64):
            with pytest.raises(PromptError, match="half of a surrogate pair"):
                llm.tokenizer.encode("a\ud800b", limit=limit)
        assert llm.tokenizer.encode("a") == [0] and not llm.engine.has_work


PICKLES: dict[str, tuple[Any, str]] = {
    "a number": (5, "must hold tensors by their names: a int"),
    "a list": ([torch.ones(2)], "must hold tensors by their names: a list"),
    "a number for a name": ({5: torch.ones(2)}, "plain tensors by their names, and 5 is no name"),
    "a number for a tensor": ({"a": 5}, "plain tensors by their names, and 'a' is a int"),
    "tensors in tensors": ({"a": {"b": torch.ones(2)}}, "plain tensors by their names, and 'a' is a dict"),
    "a sparse one": ({"a": torch.ones(2).to_sparse()}, "'a' is a tensor of layout torch.sparse_coo"),
    "an object": ({"a": Path("x")}, "cannot read .*is it complete"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_hold_other_things(tmp_path: Path, name: str) -> None:
    held, message = PICKLES[name]
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as refused:
        TensorFile(tmp_path / "pytorch_model.bin")
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("limit", [None, -1, 1.5, [1], {"a": 1}], ids=str)
def test_a_tokenizer_s_own_limit_is_none_of_the_engine_s(single: Path, limit: Any) -> None:
    write_tokenizer(single)
    file = single / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": limit}))
    tokenizer = Tokenizer(single)
    assert tokenizer.decode(tokenizer.encode("a" * 50)) == "a" * 50


def test_tokenizers(single: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        Tokenizer(single)
    with LLM(str(single), max_model_len=64) as llm:
        with pytest.raises(CheckpointError, match="no tokenizer in"):
            llm.generate("text")
        assert not llm.engine.has_work
    write_tokenizer(single)
    assert Tokenizer(single).decode(Tokenizer(single).encode("né")) == "né"
    (single / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer(single)
