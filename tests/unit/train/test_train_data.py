"""Training files: every form read alike, every fault named with file, line and remedy."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import EOS, write, write_tokenizer
from outrider.errors import DataError
from outrider.train.data import Documents, Reader, split_held_out, write_documents
from outrider.train.packing import EMPTY, Stream, pack
from outrider.train.vocabulary import DraftVocabulary

CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    path = write(tmp_path_factory.mktemp("target"))
    write_tokenizer(path, chat_template=CHAT)
    return Reader(path, 260, EOS)


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(reader: Reader, *paths: Path) -> list[list[int]]:
    documents = reader.read(paths)
    return [documents.document(index) for index in range(len(documents))]


def test_text_and_chat_and_tokens_are_the_same_documents(reader: Reader, tmp_path: Path) -> None:
    text = "<user>hi<bot>yes"
    (plain,) = read(reader, lines(tmp_path / "a.jsonl", {"text": text}))
    messages = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]
    assert plain[-1] == EOS and len(plain) == len(text) + 1
    assert read(reader, lines(tmp_path / "b.jsonl", {"messages": messages})) == [plain]
    assert read(reader, lines(tmp_path / "c.jsonl", {"token_ids": plain})) == [plain]
    (tmp_path / "d.txt").write_text(text)
    assert read(reader, tmp_path / "d.txt") == [plain]


def test_compressed_files_are_read_as_plain_ones(reader: Reader, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "one"}, {"token_ids": [1, 2]}, {"text": "two"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    expected = read(reader, path)
    assert [len(document) for document in expected] == [4, 2, 4]
    assert read(reader, tmp_path / "b.jsonl.gz") == read(reader, tmp_path / "c.jsonl.xz") == expected
    assert read(reader, path, path) == expected * 2


FAULTS: dict[str, tuple[str, str]] = {
    "not json": ("{", "not JSON"),
    "not an object": ("[1]", "one of text, messages, token_ids"),
    "no known key": ('{"prompt": "x"}', "has none of them"),
    "two keys": ('{"text": "x", "token_ids": [1]}', "has text and token_ids"),
    "text not text": ('{"text": 3}', "text must be a string"),
    "text empty": ('{"text": ""}', "not empty"),
    "messages not objects": ('{"messages": ["hi"]}', "role and content"),
    "ids not whole": ('{"token_ids": [1, true]}', "list of whole numbers"),
    "ids empty": ('{"token_ids": []}', "list of whole numbers"),
    "id beyond the vocabulary": ('{"token_ids": [1, 260]}', "token 260 is outside the target's vocabulary of 260"),
    "id negative": ('{"token_ids": [1, -1]}', "token -1 is outside"),
    "prompt of everything": ('{"token_ids": [1, 2], "prompt_length": 2}', "prompt_length must be from 0 to 1"),
    "prompt of text": ('{"text": "x", "prompt_length": 1}', "give token_ids with it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named(reader: Reader, tmp_path: Path, fault: str) -> None:
    line, message = FAULTS[fault]
    path = tmp_path / "bad.jsonl"
    path.write_text('{"token_ids": [1]}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as raised:
        reader.read([path])
    assert str(raised.value).startswith(f"{path}:2: ")


def test_a_bad_file_is_named(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a long enough line"}\n')[:-9])
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n')[:-9])
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("absent.jsonl", "cut.jsonl.gz", "cut.jsonl.xz", "latin.txt", "table.csv", "empty.jsonl"):
        with pytest.raises(DataError, match=name):
            reader.read([tmp_path / name])


def test_messages_need_a_template(tmp_path: Path) -> None:
    path = write_tokenizer(write(tmp_path / "target"))
    chat = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(DataError, match="no chat template for messages"):
        Reader(path, 260, EOS).read([chat])


def test_text_needs_a_tokenizer_and_tokens_do_not(tmp_path: Path) -> None:
    reader = Reader(write(tmp_path / "target"), 260, None)
    with pytest.raises(DataError, match="or give token_ids"):
        reader.read([lines(tmp_path / "a.jsonl", {"text": "x"})])
    assert read(reader, lines(tmp_path / "b.jsonl", {"token_ids": [7, 8]})) == [[7, 8]]


def test_written_documents_are_read_back(reader: Reader, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", [([1, 2, 3], 2), ([4, 5], 0)])
    documents = reader.read([tmp_path / "a.jsonl"])
    assert [documents.document(index) for index in range(2)] == [[1, 2, 3], [4, 5]]
    assert documents.prompt_length.tolist() == [2, 0]


def some(lengths: list[int], prompt: int = 0) -> Documents:
    """Documents of distinct tokens."""
    start = np.concatenate(([0], np.cumsum(lengths)))
    return Documents(np.arange(start[-1], dtype=np.int32), start, np.full(len(lengths), prompt, dtype=np.int32))


def test_the_last_hundredth_is_held_out() -> None:
    kept, held_out = split_held_out(some([2] * 300))
    assert held_out is not None and (len(kept), len(held_out)) == (297, 3)
    assert held_out.document(2) == [598, 599] and kept.document(0) == [0, 1]
    assert split_held_out(some([5]))[1] is None


LENGTHS = [3, 40, 16, 17, 1, 9, 9, 2, 30, 16, 5]


def test_rows_hold_every_token_once_with_its_place() -> None:
    documents = some(LENGTHS, prompt=20)
    packing = pack(documents, 16, seed=3, epoch=0)
    tokens, document, position, remaining, untrained = packing.rows(0, len(packing))
    real = document != EMPTY
    assert sorted(tokens[real].tolist()) == list(range(sum(LENGTHS)))
    assert len(packing) <= -(-sum(LENGTHS) // 16) + 2, "rows are left half empty"
    for row in range(len(packing)):
        assert (np.diff(document[row]) >= 0).all(), "documents ascend"
        for number in np.unique(document[row][real[row]]):
            at = document[row] == number
            length, first = at.sum(), tokens[row][at][0]
            assert tokens[row][at].tolist() == list(range(first, first + length))
            assert position[row][at].tolist() == list(range(length))
            assert remaining[row][at].tolist() == list(range(length))[::-1]
            cut = first - documents.start[np.searchsorted(documents.start, first, side="right") - 1]
            assert cut % 16 == 0, "only documents that are longer than a row are cut"
            ahead = [max(20 - 1 - cut - place, 0) for place in range(length)]
            assert untrained[row][at].tolist() == [min(count, length - 1 - p) for p, count in enumerate(ahead)]


def test_order_is_decided_by_seed_and_epoch() -> None:
    documents = some(LENGTHS)
    first, again = pack(documents, 16, 1, 0), pack(documents, 16, 1, 0)
    assert (first.rows(0, len(first)) == again.rows(0, len(again))).all()
    for seed, epoch in ((1, 1), (2, 0)):
        other = pack(documents, 16, seed, epoch)
        assert other.source.tolist() != first.source.tolist()


def test_a_stream_goes_on_where_it_was() -> None:
    documents = some(LENGTHS)
    whole = Stream(documents, 16, seed=5)
    taken = [whole.take(3) for _ in range(9)]
    assert whole.epoch >= 2
    half = Stream(documents, 16, seed=5)
    for _ in range(4):
        half.take(3)
    resumed = Stream(documents, 16, 5, half.epoch, half.row)
    assert all((resumed.take(3) == rows).all() for rows in taken[4:])


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_draft_vocabulary_is_the_most_frequent(size: int) -> None:
    counts = {9: 5, 2: 3, 4: 3, 7: 3, 0: 1, 8: 1, 5: 1}
    tokens = np.array([token for token, count in counts.items() for _ in range(count)], dtype=np.int32)
    documents = Documents(tokens, np.array([0, len(tokens)]), np.zeros(1, dtype=np.int32))
    vocabulary = DraftVocabulary.by_frequency(documents, 10, size, always=())
    assert vocabulary.tokens.tolist() == sorted([9, 2, 4, 7, 0, 5, 8][:size]), "ties go to the lower id"
    offset, contains = vocabulary.offset, vocabulary.contains
    for draft, target in enumerate(vocabulary.tokens.tolist()):
        assert draft + int(offset[draft]) == target and bool(contains[target])
    assert int(contains.sum()) == size and len(contains) == 10


def test_special_tokens_that_appear_can_be_drafted() -> None:
    tokens = np.array([1, 1, 1, 2, 2, 6], dtype=np.int32)
    documents = Documents(tokens, np.array([0, 6]), np.zeros(1, dtype=np.int32))
    assert DraftVocabulary.by_frequency(documents, 8, 2, always=(6, 7)).tokens.tolist() == [1, 6]
    assert DraftVocabulary.by_frequency(documents, 8, None, always=()).is_full
