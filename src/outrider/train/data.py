"""Training text: files of documents read, checked and tokenized into one flat array."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from outrider.errors import CheckpointError, DataError
from outrider.load.tokenizer import Tokenizer

KEYS = ("text", "messages", "token_ids")
BATCH = 1024
"""Texts tokenized at once, which the tokenizer spreads over the cores."""

HELD_OUT_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Documents:
    """Token sequences side by side. Document d is tokens[start[d]:start[d + 1]]."""

    tokens: NDArray[np.int32]  # [total]
    start: NDArray[np.int64]  # [D + 1]
    prompt_length: NDArray[np.int32]  # [D], leading tokens whose prediction is not trained

    def __len__(self) -> int:
        return len(self.prompt_length)

    @property
    def length(self) -> NDArray[np.int64]:
        """[D] tokens of each document."""
        return np.diff(self.start)

    def part(self, first: int, last: int) -> Documents:
        """Documents first to last, without last."""
        start = self.start[first : last + 1]
        return Documents(self.tokens[start[0] : start[-1]], start - start[0], self.prompt_length[first:last])

    def document(self, index: int) -> list[int]:
        """The tokens of one document."""
        found: list[int] = self.tokens[self.start[index] : self.start[index + 1]].tolist()
        return found


@dataclass(frozen=True, slots=True)
class _Record:
    """A document as its file has it: ids, or a text to be tokenized."""

    where: str  # file:line
    ids: Sequence[int] | None
    text: str
    prompt_length: int
    special: bool  # whether the tokenizer adds what it adds around a text


class Reader:
    """Reads documents for one target: its tokenizer, its vocabulary, its end-of-text token."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_id: int | None) -> None:
        """The tokenizer in `directory` is loaded only when there is text."""
        self._directory, self._vocab_size, self._eos = directory, vocab_size, eos_token_id
        self._tokenizer: Tokenizer | None = None

    def read(self, paths: Sequence[Path], progress: Callable[[int], None] | None = None) -> Documents:
        """Every document of the files, in order. `progress` is called with the number of documents so far.

        A text ends with the target's end-of-text token. Raises DataError naming file, line and remedy.
        """
        ids: list[NDArray[np.int32]] = []
        prompts: list[int] = []
        for batch in _batches(record for path in paths for record in self._records(path)):
            for record, tokens in zip(batch, self._tokenize(batch), strict=True):
                ids.append(tokens)
                prompts.append(record.prompt_length)
            if progress is not None:
                progress(len(ids))
        if not ids:
            raise DataError(
                f"no documents in {', '.join(map(str, paths)) or 'no file'}: give --data a file that has some"
            )
        start = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens in ids], out=start[1:])
        return Documents(np.concatenate(ids), start, np.array(prompts, dtype=np.int32))

    def _records(self, path: Path) -> Iterator[_Record]:
        kind = path.suffixes[-2:-1] if path.suffix in _OPENERS else path.suffixes[-1:]
        if kind == [".txt"]:
            yield _Record(str(path), None, "".join(_lines(path)), 0, True)
        elif kind in ([".jsonl"], [".json"]):
            for number, line in enumerate(_lines(path), start=1):
                yield self._record(f"{path}:{number}", line)
        else:
            raise DataError(f"{path}: not a kind of file that is read; give .jsonl or .txt, or these with .gz or .xz")

    def _record(self, where: str, line: str) -> _Record:
        try:
            read = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error}; every line must be one JSON object") from None
        found = [key for key in KEYS if key in read] if isinstance(read, dict) else []
        if len(found) != 1:
            said = f"has {' and '.join(found)}" if found else "has none of them"
            raise DataError(f"{where}: a line must be an object with one of {', '.join(KEYS)}; this one {said}")
        value, prompt = read[found[0]], read.get("prompt_length", 0)
        if found != ["token_ids"] and "prompt_length" in read:
            raise DataError(f"{where}: prompt_length counts tokens: give token_ids with it, not {found[0]}")
        if found == ["text"]:
            if not isinstance(value, str) or not value:
                raise DataError(f"{where}: text must be a string that is not empty: {value!r}")
            return _Record(where, None, value, 0, True)
        if found == ["messages"]:
            return _Record(where, None, self._render(where, value), 0, False)
        if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
            raise DataError(f"{where}: token_ids must be a list of whole numbers that is not empty")
        if type(prompt) is not int or not 0 <= prompt < len(value):
            raise DataError(f"{where}: prompt_length must be from 0 to {len(value) - 1}, before the end: {prompt!r}")
        return _Record(where, value, "", prompt, False)

    def _loaded(self, where: str) -> Tokenizer:
        if self._tokenizer is None:
            try:
                self._tokenizer = Tokenizer(self._directory)
            except CheckpointError as error:
                raise DataError(f"{where} is text and must be tokenized: {error}; or give token_ids") from error
        return self._tokenizer

    def _render(self, where: str, messages: Any) -> str:
        from jinja2 import TemplateError

        tokenizer = self._loaded(where).wrapped
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise DataError(f"{where}: messages must be a list of objects with role and content")
        if tokenizer.chat_template is None:
            raise DataError(f"{where}: the target has no chat template for messages: give text instead")
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{where}: the target's chat template refused the messages: {error}") from error
        return text

    def _tokenize(self, batch: Sequence[_Record]) -> list[NDArray[np.int32]]:
        """The ids of every record, checked against the vocabulary."""
        encoded: dict[int, list[int]] = {}
        for special in (True, False):
            wanted = [index for index, one in enumerate(batch) if one.ids is None and one.special == special]
            if wanted:
                backend = self._loaded(batch[wanted[0]].where).backend
                texts = [batch[index].text for index in wanted]
                found = backend.encode_batch(texts, add_special_tokens=special)
                encoded |= {index: self._ended(one.ids) for index, one in zip(wanted, found, strict=True)}
        made = []
        for index, record in enumerate(batch):
            raw = encoded.get(index, record.ids)
            assert raw is not None
            tokens = np.asarray(raw, dtype=np.int64)
            if not len(tokens):
                raise DataError(f"{record.where}: no tokens in it; leave the line out")
            outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
            if len(outside):
                raise DataError(
                    f"{record.where}: token {outside[0]} is outside the target's vocabulary of {self._vocab_size}; "
                    "tokenize with the target's own tokenizer"
                )
            made.append(tokens.astype(np.int32))
        return made

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or ids[-1:] == [self._eos] else [*ids, self._eos]


def split_held_out(documents: Documents) -> tuple[Documents, Documents | None]:
    """The documents to train on, and the last hundredth to evaluate on; None where there is only one document."""
    if len(documents) < 2:
        return documents, None
    kept = len(documents) - max(1, round(HELD_OUT_SHARE * len(documents)))
    return documents.part(0, kept), documents.part(kept, len(documents))


def write_documents(path: Path, documents: Iterable[tuple[Sequence[int], int]]) -> None:
    """Writes (token ids, prompt length) pairs as lines that `Reader` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for ids, prompt_length in documents:
            file.write(json.dumps({"token_ids": list(ids), "prompt_length": prompt_length}) + "\n")


_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}


def _lines(path: Path) -> Iterator[str]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}; convert it") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}; is it there, and complete?") from error


def _batches(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    batch: list[_Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
