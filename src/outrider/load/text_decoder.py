"""Token ids to text, one at a time: what a tokenizer's decoder makes of a sequence, however the bytes fall."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

CONTEXT = 8
"""Tokens of the prompt that the first token is decoded after: at most three of them are bytes of its character."""

STRAY = "\N{REPLACEMENT CHARACTER}"
"""What stands for a byte that belongs to no character."""


class Vocabulary:
    """What each token of a `tokenizers.Tokenizer` stands for: bytes, or text that its decoder makes in context."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        stages = _stages(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
        self.is_byte_level = "ByteLevel" in stages and set(stages) <= {"ByteLevel", "Fuse"}
        """Whether every token is a run of bytes, in the letters of GPT-2's byte alphabet."""
        self.has_byte_fallback = "ByteFallback" in stages
        """Whether tokens of the form `<0xE3>` are single bytes."""
        self.is_by_word = _is_by_word(stages)
        """Whether a token of text that is not the first makes the same text wherever it stands."""
        self.pieces: dict[int, str] = {}
        """Those texts, of tokens that came before."""
        self._special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        self._bytes: dict[int, bytes | None] = {}
        self._anchor: int | None = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text that the tokenizer's decoder makes of all tokens at once."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def is_silent(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether decoders never see a token: special ones that are skipped, and ids past the vocabulary."""
        if token in self._special:
            return skip_special_tokens
        return self.is_unknown(token)

    def context(self, prompt: Sequence[int], skip_special_tokens: bool) -> list[int]:
        """The last tokens of a prompt that decoders see."""
        heard = (token for token in reversed(prompt) if not self.is_silent(token, skip_special_tokens))
        return list(islice(heard, CONTEXT))[::-1]

    def is_unknown(self, token: int) -> bool:
        """Whether no token has this id. Models may have more rows than their tokenizer has tokens."""
        return self.spelled(token) is None and self._backend.id_to_token(token) is None

    def spelled(self, token: int) -> bytes | None:
        """The bytes that a token is; None if it is text."""
        if token not in self._bytes:
            self._bytes[token] = self._spell(token)
        return self._bytes[token]

    def _spell(self, token: int) -> bytes | None:
        written = self._backend.id_to_token(token)
        if written is None:
            return None
        if self.is_byte_level:
            try:
                return bytes(BYTE_ALPHABET[letter] for letter in written)
            except KeyError:  # an added token in letters of its own
                return str(written).encode()
        digits = written[3:5]
        if self.has_byte_fallback and written == f"<0x{digits}>" and digits.isalnum():
            try:
                return bytes([int(digits, 16)])
            except ValueError:
                return None
        return None

    @property
    def anchor(self) -> int:
        """A byte's token that is text wherever it stands: what follows it is not the start of a text."""
        if self._anchor is None:
            written = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in (*range(0x21, 0x7F), *range(0x21)))
            self._anchor = next(token for token in written if token is not None and self.decode([token], False))
        return self._anchor


def _stages(decoder: dict[str, Any]) -> list[str]:
    """The kinds of a decoder, or of those in its sequence."""
    if decoder["type"] == "Sequence":
        return [kind for inner in decoder["decoders"] for kind in _stages(inner)]
    return [decoder["type"]]


def _is_by_word(stages: Sequence[str]) -> bool:
    """Whether these stages look at one token at a time, but for the start of a text."""
    before, _, after = "/".join(stages).partition("Fuse")
    return set(stages) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and not (
        before and "Replace" in after
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter of each byte: printable ones of Latin-1 are their own, the others come after them in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class _Characters:
    """Bytes to characters as they come."""

    def __init__(self, one_mark_a_byte: bool) -> None:
        """`one_mark_a_byte`: a character cut short counts by its bytes, as ByteFallback has it; else it is one."""
        self._one_mark_a_byte = one_mark_a_byte
        self.pending = b""
        self.num_of_prompt = 0
        """How many of the pending bytes are the prompt's: if they turn out stray, the prompt's text counts them."""

    def decode(self, data: bytes, final: bool = False) -> tuple[str, bool]:
        """The characters that the bytes complete, and whether one of the bytes was stray."""
        data, text, stray = self.pending + data, "", False
        while True:
            try:
                found, used = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                text += data[: error.start].decode() + self._marks(error.start, error.end)
                data, stray = data[error.end :], True
                self.num_of_prompt = 0
                continue
            self.pending = data[used:]
            if used:
                self.num_of_prompt = 0
            return text + found, stray

    def _marks(self, start: int, end: int) -> str:
        of_prompt = self.num_of_prompt if start == 0 else 0
        return STRAY * (max(0, end - start - of_prompt) if self._one_mark_a_byte else int(not of_prompt))


class TextDecoder:
    """The text of one sequence's tokens after its prompt, token by token.

    What comes is what one decode of prompt and output adds to the prompt's text. Where it differs, a byte is stray:
    that byte is U+FFFD here, and the text before and after it stays what it is. ByteFallback, decoding all at once,
    gives up the characters around it too. Nothing is raised, whatever the tokens are.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._vocabulary, self._skip = vocabulary, skip_special_tokens
        self._characters = _Characters(one_mark_a_byte=not vocabulary.is_byte_level)
        self._context: list[int] = []  # the last tokens; all of them while they make no text
        self._text = ""  # what the context makes
        self._num_returned = 0  # letters of it that were returned
        for token in vocabulary.context(prompt, skip_special_tokens):
            self.step(token)
        self._characters.num_of_prompt = len(self._characters.pending)

    def step(self, token: int) -> str:
        """What the token adds; empty if it completes no character."""
        if self._vocabulary.is_silent(token, self._skip):
            return ""
        spelled = self._vocabulary.spelled(token)
        if spelled is None:
            return self._cut_short() + self._in_context(token)
        text, stray = self._characters.decode(spelled)
        if self._vocabulary.is_byte_level or self._text:
            return text
        # nothing has come yet, and a decoder may write the start of a text differently
        self._context.append(token)
        if text and not stray:
            text = self._decode(self._context)
        if text:
            self._anchor()
        return text

    def finish(self) -> str:
        """No token follows: a character that was cut short is stray bytes."""
        return self._cut_short() + self._take(len(self._text))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids, self._skip)

    def _cut_short(self) -> str:
        text, stray = self._characters.decode(b"", final=True)
        if stray and not self._text and not self._vocabulary.is_byte_level:
            self._anchor()
        return text

    def _anchor(self) -> None:
        """The next token follows a byte. A stray one would make the decoder give up the bytes beside it."""
        self._context = [self._vocabulary.anchor]
        self._text = self._decode(self._context)
        self._num_returned = len(self._text)

    def _in_context(self, token: int) -> str:
        is_plain = len(self._text) == self._num_returned > 0  # not the start of a text, and nothing is held back
        if is_plain and (piece := self._vocabulary.pieces.get(token)) is not None:
            return piece
        self._context.append(token)
        self._text = self._decode(self._context)
        # where a decoder joins bytes in a way of its own, the next token may complete this character
        fresh = self._take(len(self._text) - self._text.endswith(STRAY))
        if is_plain and self._vocabulary.is_by_word and STRAY not in fresh:
            self._vocabulary.pieces[token] = fresh
        if len(self._context) > 2 * CONTEXT:
            self._shorten()
        return fresh

    def _take(self, end: int) -> str:
        fresh = self._text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return fresh

    def _shorten(self) -> None:
        """Lets go of what is far back, unless the rest would then begin a text."""
        shorter = self._context[-CONTEXT:]
        text, num_held = self._decode(shorter), len(self._text) - self._num_returned
        if len(text) > num_held:
            self._context, self._text, self._num_returned = shorter, text, len(text) - num_held


def decode_all(vocabulary: Vocabulary, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of a whole sequence, as a TextDecoder has it."""
    text = vocabulary.decode(ids, skip_special_tokens)
    if STRAY not in text or not vocabulary.has_byte_fallback:
        return text
    decoder = TextDecoder(vocabulary, (), skip_special_tokens)
    return "".join([decoder.step(token) for token in ids]) + decoder.finish()
