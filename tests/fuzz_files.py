"""Random checkpoints of tiny models: their configs, weight files and tokenizers, whole and damaged."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SINGLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, -1.5, 16.0, 1e300, float("nan"), float("inf"), 10**30, 2**31, 2**45),
    *("", "x", "1", "auto", "float32", "torch.bfloat16", "float64", "yarn", "default", "LlamaForCausalLM", "\ud800"),
    *([], [1], [0, 1], [1.5], ["x"], [["x"]], [None], {}, {"a": 1}, {"full_attention": {}}, [[[[]]]]),
]
KEYS = [
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("hidden_act", "dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "partial_rotary_factor", "quantization_config"),
    *("original_max_position_embeddings", "auto_map", "attention_dropout", "use_cache", "pretraining_tp", "is_decoder"),
    *("text_config", "num_experts", "attn_logit_softcapping", "final_logit_softcapping", "initializer_range"),
]
GENERATION_KEYS = ["eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample"]


def hostile(rng: random.Random) -> Any:
    """One of them, for this case alone: what is damaged later may be inside it."""
    return copy.deepcopy(rng.choice(HOSTILE))


@dataclass
class Made:
    """A checkpoint, and what was done to it."""

    path: Path
    family: str
    config: dict[str, Any]
    done: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Keys and files of which one should stand in a refusal."""


def sizes(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([2, 4])
    return {
        "vocab_size": rng.choice([48, 64]),
        "hidden_size": 16,
        "intermediate_size": rng.choice([16, 24]),
        "num_hidden_layers": rng.choice([1, 1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, heads // 2, heads]),
        "head_dim": rng.choice([4, 8, 16]),
        "max_position_embeddings": rng.choice([32, 48]),
    }


def rope(rng: random.Random, pairs: int) -> dict[str, Any]:
    """What one place of a config says of rotary embedding."""
    kind = rng.choice(["default", "linear", "dynamic", "yarn", "yarn", "longrope", "llama3"])
    made: dict[str, Any] = {rng.choice(["rope_type", "rope_type", "type"]): kind}
    values: dict[str, list[Any]] = {
        "factor": [1.0, 2, 2.5, 4.0, None],
        "original_max_position_embeddings": [16, 24, 32],
        "attention_factor": [0.8, 1.3, None],
        "mscale": [0.7, 1.0, 0, None],
        "mscale_all_dim": [0.7, 1.0, 0, None],
        "beta_fast": [32, 16, 64.0, None],
        "beta_slow": [1, 2, None],
        "truncate": [True, False],
        "low_freq_factor": [1.0, 2.0],
        "high_freq_factor": [4.0, 3.0],
        "short_factor": [[1.0 + 0.1 * pair for pair in range(pairs)]],
        "long_factor": [[1.0 + 3.0 * pair for pair in range(pairs)]],
    }
    yarn = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
    reads = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings", "attention_factor", *yarn),
        "longrope": ("short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[kind]
    needed = ("factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor")
    for key in (*reads, "rope_theta"):
        if key in needed or rng.random() < 0.6:
            made[key] = rng.choice(values[key]) if key in values else rng.choice([1e4, 5e5, 100.0, 1000])
    if rng.random() < 0.05:
        made["orignal_max_position_embeddings"] = 16
    return made


def config(rng: random.Random, family: str) -> dict[str, Any]:
    """A config that transformers loads, in the spelling of its fourth or its fifth version."""
    made = {"architectures": [CLASSES[family]], "model_type": family, **sizes(rng)}
    made |= {"hidden_act": "silu", "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-2]), "use_cache": True}
    pairs = made["head_dim"] // 2
    for key in ("rope_scaling", "rope_parameters"):
        if rng.random() < 0.5:
            made[key] = rng.choice([rope(rng, pairs), rope(rng, pairs), rope(rng, pairs), {}, None])
    if rng.random() < 0.6:
        made["rope_theta"] = rng.choice([1e4, 500, 1e6])
    if rng.random() < 0.1:
        made["original_max_position_embeddings"] = rng.choice([16, 24])
    for key in ("tie_word_embeddings", "attention_bias"):
        if rng.random() < 0.7:
            made[key] = rng.random() < 0.4
    if family == "llama" and rng.random() < 0.5:
        made["mlp_bias"] = rng.random() < 0.5
    for key in ("dtype", "torch_dtype"):
        if rng.random() < 0.5:
            made[key] = rng.choice(["float32", "bfloat16", "float16"])
    if rng.random() < 0.7:
        made["eos_token_id"] = rng.choice([None, 0, 2, [1, 3], [5, 5], 9999, [2, 77]])
    if family == "qwen3" and rng.random() < 0.4:
        made |= {"use_sliding_window": False, "sliding_window": rng.choice([None, 8]), "max_window_layers": 1}
    if rng.random() < 0.2:
        made["layer_types"] = ["full_attention"] * made["num_hidden_layers"]
    for key in ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"):
        if rng.random() < 0.06:
            del made[key]
    return made


def tensors(made: dict[str, Any], family: str, seed: int) -> dict[str, Tensor]:
    """Every tensor of a config, drawn anew for each; norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = made["hidden_size"], made["intermediate_size"], made["vocab_size"]
    heads = made["num_attention_heads"]
    head_dim = made.get("head_dim", 128 if family == "qwen3" else hidden // heads)
    query, key = heads * head_dim, made.get("num_key_value_heads", 32 if family == "qwen3" else heads) * head_dim

    def matrix(*shape: int) -> Tensor:
        return 0.25 * torch.randn(shape, generator=generator)

    def norm(width: int) -> Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    found = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": norm(hidden)}
    if not made.get("tie_word_embeddings"):
        found["lm_head.weight"] = matrix(vocab, hidden)
    for index in range(made["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        found |= {f"{layer}{name}.weight": norm(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
        for name, shape in rows.items():
            found[f"{layer}self_attn.{name}_proj.weight"] = matrix(*shape)
            if made.get("attention_bias"):
                found[f"{layer}self_attn.{name}_proj.bias"] = matrix(shape[0])
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            found[f"{layer}mlp.{name}_proj.weight"] = matrix(*shape)
            if made.get("mlp_bias"):
                found[f"{layer}mlp.{name}_proj.bias"] = matrix(shape[0])
        if family == "qwen3":
            found |= {f"{layer}self_attn.{name}_norm.weight": norm(head_dim) for name in "qk"}
    return found


def save(path: Path, held: dict[str, Tensor], rng: random.Random, parts: int = 1) -> None:
    """Writes weights as one file, or as shards with their index."""
    held = {name: tensor.contiguous() for name, tensor in held.items()}
    if parts == 1:
        save_file(held, path / SINGLE, metadata={"format": "pt"})
        return
    files = [f"model-{part + 1:05}-of-{parts:05}.safetensors" for part in range(parts)]
    where = {name: rng.choice(files) for name in held}
    for file in files:
        shard = {name: held[name] for name in held if where[name] == file}
        save_file(shard, path / file, metadata={"format": "pt"})
    written = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / INDEX).write_text(json.dumps(written))


def write_weights(made: Made, held: dict[str, Tensor], rng: random.Random) -> None:
    """Weights in one of the ways in which they are about, or in one that is wrong."""
    path, ways = made.path, WEIGHT_WAYS
    way = "plain" if rng.random() < 0.45 else rng.choice(list(ways))
    if rng.random() < 0.2:
        kinds = [torch.bfloat16, torch.float16]
        held = {name: tensor.to(rng.choice(kinds)) for name, tensor in held.items()}
    made.done.append(f"weights {way}")
    ways[way](path, held, rng)


def _plain(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    save(path, held, rng)


def _with(change: Callable[[dict[str, Tensor], random.Random], Any]) -> Callable[..., None]:
    """Weights that are otherwise than they should be."""

    def write(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
        changed = dict(held)
        change(changed, rng)
        save(path, changed, rng, rng.choice([1, 1, 2]))

    return write


def _one(held: dict[str, Tensor], rng: random.Random) -> str:
    return rng.choice(sorted(held))


def _one_as(change: Callable[[Tensor, random.Random], Tensor]) -> Callable[..., None]:
    """Weights of which one is changed."""

    def edit(held: dict[str, Tensor], rng: random.Random) -> None:
        name = _one(held, rng)
        held[name] = change(held[name], rng)

    return _with(edit)


def _rename(held: dict[str, Tensor], to: Callable[[str], str]) -> None:
    renamed = {to(name): tensor for name, tensor in held.items()}
    held.clear()
    held.update(renamed)


def _other(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * 1.5 + 0.1 for name, tensor in held.items()}


def _both(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    first, second = rng.sample([held, _other(held)], 2)
    save(path, first, rng, 2)
    save(path, second, rng)


def _stale(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    save(path, held, rng, 2)
    index = json.loads((path / INDEX).read_text())
    where, name = index["weight_map"], _one(held, rng)
    files = sorted(set(where.values()))
    way = rng.randrange(6)
    if way == 0:
        where[name] = "model-00009-of-00009.safetensors"
    elif way == 1:
        where[name] = files[0]
    elif way == 2:
        del where[name]
    elif way == 3:
        where["model.gone.weight"] = files[0]
    elif way == 4:
        for name in where:
            where[name] = files[0]
    else:
        where[name] = rng.choice(["../" + files[0], "/etc/passwd", "", ".", "config.json", 5, None, "x\x00y"])
    (path / INDEX).write_text(json.dumps(index))


def _extra_file(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    save(path, held, rng, rng.choice([1, 2]))
    name = rng.choice(["consolidated.safetensors", "model-00001-of-00001.safetensors", "adapter_model.safetensors"])
    save_file(_other(held), path / name, metadata={"format": "pt"})


def _pickled(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    torch.save(held, path / PICKLED)
    if rng.random() < 0.3:
        save(path, _other(held), rng)


def _single_listed(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    save(path, held, rng)
    names = sorted(held)
    if rng.random() < 0.5:
        names = names[1:]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))


def _header(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    """A header that lies about one tensor."""
    save(path, held, rng)
    data = (path / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header[_one(held, rng)]
    way = rng.randrange(7)
    if way == 0:
        entry["data_offsets"] = rng.choice([[0, 2**40], [-1, 4], [8, 4], [0, 0], "x", [0], None])
    elif way == 1:
        entry["shape"] = rng.choice([[2**40, 2**40], [0], [], [-1, 4], ["a"], [1.5], None, [2**63, 4]])
    elif way == 2:
        entry["dtype"] = rng.choice(["F64", "BF16", "F8_E4M3", "I32", "BOOL", "X", 5, None, "F4", "C64"])
    elif way == 3:
        header[_one(held, rng)] = rng.choice([None, [], {}, 5])
    elif way == 4:
        header["__metadata__"] = rng.choice([None, 5, {"format": "tf"}, {"a": 1}, {}])
    elif way == 5:
        del header[_one(held, rng)]
    written = json.dumps(header).encode()
    length = rng.choice([2**63, 2**30, 0, 7, len(written) - 3]) if way == 6 else len(written)
    (path / SINGLE).write_bytes(struct.pack("<Q", length) + written + data[8 + len(json.dumps(header)) :])


def _bytes(path: Path, held: dict[str, Tensor], rng: random.Random) -> None:
    """Bytes cut off, or others in their place."""
    save(path, held, rng)
    data = bytearray((path / SINGLE).read_bytes())
    way = rng.randrange(4)
    if way == 0:
        data = data[: rng.randrange(len(data))]
    elif way == 1:
        data += b"\x00" * rng.randint(1, 50)
    elif way == 2:
        place = rng.randrange(min(400, len(data)))
        data[place] = rng.randrange(256)
    else:
        data = bytearray(
            rng.choice([b"", b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
        )
    (path / SINGLE).write_bytes(bytes(data))


WEIGHT_WAYS: dict[str, Callable[..., None]] = {
    "plain": _plain,
    "sharded": lambda path, held, rng: save(path, held, rng, rng.choice([2, 3])),
    "one file and shards": _both,
    "a stale index": _stale,
    "one file that an index lists": _single_listed,
    "a further file": _extra_file,
    "pickled": _pickled,
    "none": lambda path, held, rng: None,
    "without model.": _with(lambda held, rng: _rename(held, lambda name: name.removeprefix("model."))),
    "with a prefix": _with(lambda held, rng: _rename(held, lambda name: f"{rng.choice(['model.', 'x.'])}{name}")),
    "head alone": _with(lambda held, rng: held.update({"lm_head.weight": held.pop("model.embed_tokens.weight")})),
    "head beside embedding": _with(
        lambda held, rng: held.setdefault("lm_head.weight", held["model.embed_tokens.weight"] * rng.choice([1.0, 1.5]))
    ),
    "no head": _with(lambda held, rng: held.pop("lm_head.weight", None)),
    "one missing": _with(lambda held, rng: held.pop(_one(held, rng))),
    "one of another shape": _one_as(lambda tensor, rng: tensor[..., : rng.choice([0, 3])]),
    "one turned": _one_as(lambda tensor, rng: tensor.mT if tensor.dim() > 1 else tensor[None]),
    "one of whole numbers": _one_as(lambda tensor, rng: tensor.to(torch.int8)),
    "one of 64 bits": _one_as(lambda tensor, rng: tensor.double()),
    "one of 8 bits": _one_as(lambda tensor, rng: tensor.to(torch.float8_e4m3fn)),
    "one of no number": _one_as(lambda tensor, rng: tensor * float(rng.choice(["nan", "inf"]))),
    "one more": _with(
        lambda held, rng: held.update(
            {
                rng.choice(
                    ["model.layers.9.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "x"]
                ): torch.ones(2)
            }
        )
    ),
    "one under two names": _with(
        lambda held, rng: held.update({(name := _one(held, rng)).removeprefix("model."): held[name] * 2})
    ),
    "a header that lies": _header,
    "bytes": _bytes,
}


def damage_values(made: Made, rng: random.Random) -> None:
    """Otherwise than it should be: one to three values of the config."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key = made.config, rng.choice(KEYS)
        inner = [each for each in ("rope_scaling", "rope_parameters") if isinstance(made.config.get(each), dict)]
        if inner and rng.random() < 0.35:
            holder = made.config[inner[0]]
            key = rng.choice([*holder, "factor", "rope_type", "rope_theta", "partial_rotary_factor", "mrope_section"])
        if rng.random() < 0.2:
            holder.pop(key, None)
        else:
            holder[key] = hostile(rng)
        made.done.append(f"{key} = {holder.get(key, 'left out')!r}")
        made.keys.append(key)


def damage_text(text: bytes, rng: random.Random) -> bytes:
    """A JSON file that may be none any more."""
    way, place = rng.randrange(9), rng.randrange(len(text))
    if way == 0:
        return text[:place]
    if way == 1:
        return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    if way == 2:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"// x\n"]) + text
    if way == 3:
        return rng.choice([b"", b" ", b"null", b"[]", b"5", b'"x"', b"{}", b"\x00" * 40, b"[" * 100_000])
    if way == 4:  # a key twice
        return b'{"hidden_size": 8, "eos_token_id": 7,' + text[1:]
    if way == 5:
        return text.decode().encode("utf-16")
    if way == 6:
        return text[:-1] + b', "x": ' + rng.choice([b"NaN", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 50]) + b"}"
    if way == 7:
        return text[:-1] + b",}"
    return text + rng.choice([b"}", b"\n\n", b" x", text])


def write_generation_config(made: Made, rng: random.Random) -> None:
    """Beside the config, what generation is to do; now and then what it cannot."""
    said: dict[str, Any] = {}
    if rng.random() < 0.8:
        said["eos_token_id"] = rng.choice([0, 1, [1, 4], [9999], None])
    for key in rng.sample(GENERATION_KEYS, rng.choice([0, 1, 2])):
        said[key] = hostile(rng) if rng.random() < 0.3 else rng.choice([1, 0.5, 20])
        made.keys.append(key)
    text = json.dumps(said).encode()
    if rng.random() < 0.15:
        text = damage_text(text, rng)
        made.keys.append("generation_config")
    (made.path / "generation_config.json").write_bytes(text)
    made.done.append(f"generation_config {said}")


def write_checkpoint(path: Path, rng: random.Random) -> Made:
    """A checkpoint, damaged or not."""
    family = rng.choice(list(CLASSES))
    made = Made(path, family, config(rng, family))
    held = tensors(made.config, family, rng.randrange(2**31))
    path.mkdir(parents=True, exist_ok=True)
    write_weights(made, held, rng)
    if rng.random() < 0.35:
        damage_values(made, rng)
    text = json.dumps(made.config).encode()
    if rng.random() < 0.06:
        text = damage_text(text, rng)
        made.done.append(f"config.json {text[:40]!r}")
    (path / "config.json").write_bytes(text)
    if rng.random() < 0.3:
        write_generation_config(made, rng)
    return made
