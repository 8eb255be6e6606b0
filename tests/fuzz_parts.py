"""Random draft heads and tokenizers for one tiny target: they serve as they should, or are refused in our words."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import checkpoints
import heads
from fuzz_files import PICKLED, SINGLE, WEIGHT_WAYS, damage_text, hostile
from outrider import LLM, SamplingParams
from outrider.errors import InputError

SIZES: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
HEAD_KEYS = [
    *("speculators_model_type", "architectures", "draft_vocab_size", "target_hidden_size", "norm_before_residual"),
    *("eagle_aux_hidden_state_layer_ids", "mask_token_id", "ptd_token_id", "parallel_drafting", "eagle_config"),
    *("transformer_layer_config", "norm_before_fc", "fc_norm", "norm_output", "target_vocab_size", "fc_bias"),
    *(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "vocab_size",
        "rope_scaling",
        "model_type",
    ),
]
SPOILT = [
    *("one missing", "one of another shape", "one turned", "one of whole numbers", "one of 64 bits"),
    *("one of no number", "a header that lies", "bytes", "none"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
PROMPTS = [{"prompt_token_ids": [5, 9, 5, 9, 5]}, {"prompt_token_ids": list(range(40))}]


def _tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@cache
def expected(target: Path) -> list[list[int]]:
    """The target's tokens without drafts."""
    with LLM(str(target), kv_cache_memory=1 << 20, max_num_seqs=4) as llm:
        return _tokens(llm)


def write_target(path: Path) -> Path:
    """What heads draft for, and tokenizers are of."""
    return checkpoints.write(path, "qwen3", **SIZES)


def damage_object(held: dict[str, Any], keys: list[str], rng: random.Random) -> str:
    """One value of an object, or of one inside it, otherwise than it should be."""
    inner = [value for value in held.values() if isinstance(value, dict) and value]
    if inner and rng.random() < 0.5:
        held = rng.choice(inner)
    key = rng.choice([*held, *keys])
    if rng.random() < 0.2:
        held.pop(key, None)
    else:
        held[key] = hostile(rng)
    return f"{key} = {held.get(key, 'left out')!r}"


def head_case(path: Path, target: Path, rng: random.Random) -> tuple[list[str], Callable[[], str | None]]:
    """A head, and what runs it: it gives what is wrong with its tokens, or None."""
    parallel, layout = rng.random() < 0.5, rng.choice(list(heads.LAYOUTS))
    done = [f"a head, {layout}, {parallel}"]
    heads.write_head(
        path,
        parallel,
        layout=layout,
        num_layers=rng.choice([1, 2]) if parallel else 1,
        draft_vocab_size=rng.choice([None, 64]),
        qk_norm=rng.random() < 0.3,
        norms=rng.choice([(), (), ("input_norm",), ("fc_norm",)]),
        bias=rng.random() < 0.2,
        sizes=SIZES,
    )
    config = json.loads((path / "config.json").read_text())
    if rng.random() < 0.5:
        done += [damage_object(config, HEAD_KEYS, rng) for _ in range(rng.choice([1, 1, 2]))]
    text = json.dumps(config).encode()
    if rng.random() < 0.05:
        text = damage_text(text, rng)
        done.append("config.json's text")
    (path / "config.json").write_bytes(text)
    if rng.random() < 0.4:
        done.append(_spoil_head(path, rng))
    options: dict[str, Any] = {"model": str(path), "num_speculative_tokens": rng.choice([1, 3])}
    if rng.random() < 0.3:
        options["method"] = "peagle" if parallel else "eagle3"

    def run() -> str | None:
        with LLM(str(target), kv_cache_memory=1 << 20, max_num_seqs=4, speculative_config=options) as llm:
            found = _tokens(llm)
        return None if found == expected(target) else f"with drafts {found}, and without {expected(target)}"

    return done, run


def _spoil_head(path: Path, rng: random.Random) -> str:
    if (path / PICKLED).exists():
        data = (path / PICKLED).read_bytes()
        held = torch.load(path / PICKLED)
        way = rng.randrange(4)
        if way == 0:
            (path / PICKLED).write_bytes(data[: rng.randrange(len(data))])
        elif way == 1:
            torch.save(rng.choice([5, [1], {"a": 5}, {5: torch.ones(2)}, {"a": {"b": torch.ones(2)}}]), path / PICKLED)
        elif way == 2:
            name = rng.choice(sorted(held))
            held[name] = rng.choice([held[name][..., :1], held[name].to_sparse(), held[name].to(torch.int8), Path("x")])
            torch.save(held, path / PICKLED)
        else:
            (path / PICKLED).write_bytes(rng.choice([b"", b"x" * 100, b"PK\x03\x04" + data[4:200], b"\x80\x02]."]))
        return f"a pickle, {way}"
    way = rng.choice(SPOILT)
    held = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    WEIGHT_WAYS[way](path, held, rng)
    return f"weights {way}"


def _fallback(rng: random.Random) -> Tokenizer:
    """Llama 2's way: bytes for what is no word."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "the", "e", "日"]
    vocab = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    last = rng.choice([[], [decoders.Strip(" ", 1, 0)]])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _pieces(rng: random.Random) -> Tokenizer:
    """Unigram with marks for spaces."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), ("e", -3.0), ("t", -3.5)], 0))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=rng.choice(["always", "never", "first"]))
    return tokenizer


TEXTS = ["the e t", "é日本🙂", "<eos>a</s>", " \n ", "e" * 30, "\u0000\ufffd", "<extra>e"]
TEMPLATES: list[Any] = [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ messages[0].content.x.y }}",
    "{% for m in messages %}",
    "{{ raise_exception('no') }}",
    "",
    5,
    [{"name": "default", "template": "{{ messages }}"}],
    "{{ 1 / 0 }}",
]


def tokenizer_case(path: Path, target: Path, rng: random.Random) -> tuple[list[str], Callable[[], str | None]]:
    """A tokenizer beside a target, and what uses it: it gives what is wrong, or None."""
    shutil.copytree(target, path, dirs_exist_ok=True)
    kind = rng.choice(["bytes", "fallback", "pieces"])
    done = [f"a tokenizer of {kind}"]
    if kind == "bytes":
        checkpoints.write_tokenizer(path)
    else:
        tokenizer = _fallback(rng) if kind == "fallback" else _pieces(rng)
        if rng.random() < 0.4:
            tokenizer.add_tokens([AddedToken("<extra>"), *(f"<more{number}>" for number in range(30))])
        ends = {"eos_token": "</s>"} if kind == "fallback" and rng.random() < 0.7 else {}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(path)
    said = json.loads((path / "tokenizer_config.json").read_text())
    if rng.random() < 0.5:
        said["chat_template"] = rng.choice(TEMPLATES)
        done.append(f"chat_template {said['chat_template']!r}")
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if rng.random() < 0.35:
            held = json.loads((path / name).read_text())
            keys = ["eos_token", "added_tokens_decoder", "model_max_length", "tokenizer_class", "auto_map", "vocab"]
            done.append(f"{name}: {damage_object(held, keys, rng)}")
            (path / name).write_text(json.dumps(held))
        if rng.random() < 0.06:
            (path / name).write_bytes(damage_text((path / name).read_bytes(), rng))
            done.append(f"{name}'s text")

    def run() -> str | None:
        short = SamplingParams(temperature=0.0, max_tokens=4)
        with LLM(str(path), kv_cache_memory=1 << 20, max_num_seqs=4) as llm:
            tokenizer = llm.tokenizer
            theirs = AutoTokenizer.from_pretrained(str(path))
            theirs.model_max_length = 10**6  # where it is no number, transformers encodes nothing
            for text in TEXTS:
                try:
                    ids = tokenizer.encode(text)
                except InputError:  # a character that its vocabulary does not have
                    continue
                if ids != theirs.encode(text):
                    return f"{text!r} is {ids}, and {theirs.encode(text)} in transformers"
                for ask in (
                    lambda text=text: llm.generate(text, short),
                    lambda text=text: llm.chat([{"role": "user", "content": text}], short),
                ):
                    try:
                        ask()
                    except InputError as error:
                        if len(str(error)) < 10:
                            return f"says too little: {error}"
        return None

    return done, run
