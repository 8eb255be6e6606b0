"""A text has no fewer tokens than its bytes say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from outrider.errors import PromptError
from outrider.load import tokenizer as tokenizer_module
from outrider.load.token_bounds import max_bytes_per_token
from outrider.load.tokenizer import Tokenizer as OurTokenizer

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXTS = [
    "the quick brown fox   jumps over the lazy dog " * 3,
    "né à Zürich, 日本語のテキスト 각각",
    "a        b\n\n\n\n" * 5,
]


def byte_level(normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


def byte_fallback() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["\u2581", "t", "h", "e", "th", "the", "\u2581the", "\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *words])}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581"), ("\u2581\u2581", "\u2581\u2581")]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return made


BOUNDED = {
    "byte-level": byte_level(),
    "byte-level, NFC": byte_level(normalizers.NFC()),
    "byte-fallback": byte_fallback(),
}


@pytest.mark.parametrize("kind", BOUNDED)
@SETTINGS
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("the  \u0301\u0323e각"))))
def test_no_text_has_fewer_tokens(kind: str, text: str) -> None:  # bug 13
    tokenizer = BOUNDED[kind]
    longest = max_bytes_per_token(tokenizer)
    assert longest is not None
    for one in (text, *(f"{text}{known}" * 3 for known in (*TEXTS, "<|end|>"))):
        assert len(tokenizer.encode(one)) * longest >= len(one.encode())


def test_the_bound_is_no_larger_than_it_must_be() -> None:
    """The negative control: with the bound of a vocabulary of bytes, texts have fewer tokens."""
    assert any(len(BOUNDED["byte-level"].encode(text)) < len(text.encode()) / 2 for text in TEXTS)
    longest = {kind: max_bytes_per_token(tokenizer) for kind, tokenizer in BOUNDED.items()}
    assert longest["byte-fallback"] == len("<0x00>") and longest["byte-level, NFC"] == 4 * (longest["byte-level"] or 0)


def unbounded() -> list[Tokenizer]:
    made = [Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})), Tokenizer(models.BPE({"a": 0}, [], unk_token="a"))]
    for normalizer in (normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("a", ""), normalizers.Lowercase()):
        made.append(byte_level(normalizer))
    greedy, dropping = byte_level(), byte_level()
    greedy.add_special_tokens([AddedToken("<|x|>", rstrip=True, special=True)])
    removed = pre_tokenizers.Split(" ", "removed")
    dropping.pre_tokenizer = pre_tokenizers.Sequence([removed, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return [*made, greedy, dropping]


@pytest.mark.parametrize("number", range(len(unbounded())))
def test_where_a_token_may_hold_any_text_there_is_no_bound(number: int) -> None:
    assert max_bytes_per_token(unbounded()[number]) is None


def test_what_can_never_fit_is_not_encoded(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = OurTokenizer(tiny("qwen3"))
    assert tokenizer.encode("some text", limit=100) == tokenizer.encode("some text")
    with pytest.raises(PromptError, match="has 120 tokens, which leaves no room"):
        tokenizer.encode("x" * 120, limit=100)
    monkeypatch.setattr(tokenizer, "_backend", None)
    with pytest.raises(PromptError, match=r"has at least [0-9]+ tokens, which leaves no room"):
        tokenizer.encode("x" * 10_000, limit=100)
    monkeypatch.setattr(tokenizer_module, "max_bytes_per_token", lambda _: None)
    tokenizer = OurTokenizer(tiny("qwen3"))
    with pytest.raises(PromptError, match="has 10000 tokens"):
        tokenizer.encode("x" * 10_000, limit=100)
