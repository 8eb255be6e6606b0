"""How much text one token may stand for: a prompt that can never fit is known by its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from outrider.load.text_decoder import BYTE_ALPHABET

WORD_START = "\u2581"
"""What SentencePiece's vocabularies write for a space."""

NFC_SHRINKS = 4
"""Bytes that NFC may make one of: no character has more than four in its decomposition, of no more bytes each."""


def max_bytes_per_token(backend: Any) -> int | None:
    """Most bytes of a text that one token of a `tokenizers.Tokenizer` stands for; None if there is no such number.

    There is one where every byte of a text reaches the vocabulary, and the vocabulary has every byte.
    """
    if type(backend.model).__name__ != "BPE":
        return None  # a word that is unknown is one token, however long it is
    shrinks = 1
    for stage in _stages(backend.normalizer, "normalizers"):
        if stage["type"] == "NFC":
            shrinks = NFC_SHRINKS
        elif stage["type"] != "Prepend" and not _writes_spaces(stage):
            return None
    kinds = set()
    for stage in _stages(backend.pre_tokenizer, "pretokenizers"):
        if stage["type"] not in ("ByteLevel", "Metaspace", "Split", "Digits") or stage.get("behavior") == "Removed":
            return None
        kinds.add(stage["type"])
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None  # they take any number of spaces with them
    if "ByteLevel" in kinds:
        has_all_bytes = all(letter in vocabulary for letter in BYTE_ALPHABET)
        longest = max(map(len, vocabulary), default=0)
    else:
        has_all_bytes = backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        longest = max((len(token.replace(WORD_START, " ").encode()) for token in vocabulary), default=0)
    if not has_all_bytes:
        return None
    return shrinks * max([longest, *(len(token.content.encode()) for token in added)])


def _stages(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """The stages of a normaliser or of a pre-tokeniser, one after another."""
    if part is None:
        return
    to_read = [json.loads(part.__getstate__())]
    while to_read:
        stage = to_read.pop()
        if stage["type"] == "Sequence":
            to_read += stage[inner]
        else:
            yield stage


def _writes_spaces(stage: dict[str, Any]) -> bool:
    """Whether it only writes spaces as vocabularies do."""
    return (stage["type"], stage.get("pattern"), stage.get("content")) == ("Replace", {"String": " "}, WORD_START)
