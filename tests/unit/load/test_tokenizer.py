"""What a tokenizer makes of text is what transformers makes of it, on the first start and from the cache."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_text_decoder import SPECIAL, TOKENIZERS, WORDS, byte_level
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outrider import env
from outrider.load import tokenizer_cache
from outrider.load.tokenizer import Tokenizer
from outrider.load.tokenizer_cache import TokenizerCache

ALPHABET = [
    "a",
    "the",
    "  ",
    " t",
    "é",
    "日本",
    "\n\n",
    "12345",
    "'s",
    "<s>",
    "</s>",
    "[INST]",
    "<eos>",
    "<more>",
    "🦊",
    ".",
]


def _unigram() -> Backend:
    backend = Backend(models.Unigram([(word, -float(at)) for at, word in enumerate([*SPECIAL, *WORDS, "a"])], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return backend


def _wordpiece() -> Backend:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "a", "##s", "##e", "'", ".", "日", "本"]
    backend = Backend(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return backend


def _cut_and_padded() -> Backend:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    **TOKENIZERS,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "cut and padded": _cut_and_padded,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "begins": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "does not begin": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True},
    "splits special tokens": {"eos_token": "<eos>", "split_special_tokens": True},
    "more tokens": {
        "added_tokens_decoder": {
            "300": {
                "content": "<more>",
                "lstrip": True,
                "rstrip": True,
                "normalized": False,
                "single_word": False,
                "special": False,
            }
        },
        "additional_special_tokens": ["<|im_end|>"],
    },
    "cleans up": {"clean_up_tokenization_spaces": True, "add_prefix_space": True},
    "qwen": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<eos>"},
    "qwen fast": {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"},
    "llama": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False},
    "llama fast": {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "add_bos_token": True},
    "gpt2": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
}


def _texts() -> list[str]:
    chosen = random.Random(5)
    return ["", *("".join(chosen.choices(ALPHABET, k=chosen.randrange(1, 12))) for _ in range(30))]


def _forbid_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("transformers was asked, though the cache holds the tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return made


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_later_starts_read_text_as_transformers_does(
    directory: Path, backend: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    BACKENDS[backend]().save(str(directory / "tokenizer.json"))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIGS[config]}
    (directory / "tokenizer_config.json").write_text(json.dumps(given))
    try:
        reference = AutoTokenizer.from_pretrained(str(directory))
    except Exception:
        pytest.skip("transformers does not load this pair")
    first = Tokenizer(directory)
    _forbid_transformers(monkeypatch)
    later = Tokenizer(directory)
    assert later.backend.to_str() == first.backend.to_str()
    for tokenizer in (first, later):
        for text in _texts():
            for special in (True, False):
                assert tokenizer.encode(text, special) == reference.encode(text, add_special_tokens=special)
            ids = reference.encode(text)
            assert tokenizer.backend.decode(ids) == reference.backend_tokenizer.decode(ids)


def test_tokens_of_a_special_tokens_map(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<more>", "eos_token": "<eos>"}))
    first = Tokenizer(directory)
    assert first.encode("a<more>") == first.wrapped.encode("a<more>") and len(first.encode("<more>")) == 1
    _forbid_transformers(monkeypatch)
    assert Tokenizer(directory).encode("a<more>") == first.encode("a<more>")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "split_special_tokens": true}'),
        lambda path: (path / "added_tokens.json").write_text('{"<new>": 400}'),
        lambda path: (path / "config.json").write_text('{"model_type": "llama"}'),
        lambda path: _unigram().save(str(path / "tokenizer.json")),
    ],
    ids=["tokenizer_config.json", "added_tokens.json", "config.json", "tokenizer.json"],
)
def test_a_changed_file_is_another_place(directory: Path, change: Callable[[Path], object]) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
    before = TokenizerCache.of(directory)
    assert before == TokenizerCache.of(directory)
    change(directory)
    assert TokenizerCache.of(directory).file != before.file


def test_another_version_of_a_library_is_another_place(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
    before = TokenizerCache.of(directory)
    monkeypatch.setattr(tokenizer_cache, "version", lambda name: "0.0")
    assert TokenizerCache.of(directory).file != before.file


@pytest.mark.parametrize("spoilt", ["", "{", "{}", "[]", '{"backend": "{}", "encode_special_tokens": false}', "\udcff"])
def test_a_damaged_cache_is_made_again(directory: Path, spoilt: str) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
    expected = Tokenizer(directory).encode("the é")
    file = TokenizerCache.of(directory).file
    whole = file.read_text()
    file.write_bytes(spoilt.encode(errors="surrogateescape"))
    assert Tokenizer(directory).encode("the é") == expected and file.read_text() == whole


def test_no_cache_can_be_written(directory: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    byte_level().save(str(directory / "tokenizer.json"))
    assert Tokenizer(directory).encode("the") == Tokenizer(directory).encode("the")


def test_one_backend_serves_both(directory: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<eos>").save_pretrained(directory)
    Tokenizer(directory)
    later = Tokenizer(directory)
    assert later.wrapped.backend_tokenizer is later.backend


def test_an_added_token_keeps_its_kind(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("<think>", special=True)])
    backend.save(str(directory / "tokenizer.json"))
    first = Tokenizer(directory)
    _forbid_transformers(monkeypatch)
    later = Tokenizer(directory)
    kinds = {token.content: token.special for token in later.backend.get_added_tokens_decoder().values()}
    assert kinds == {token.content: token.special for token in first.backend.get_added_tokens_decoder().values()}
    assert not kinds["<tool>"] and kinds["<think>"]
