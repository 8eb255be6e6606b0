"""Text that comes token by token is the text of all tokens, whatever bytes they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import checkpoints
from outrider import LLM, SamplingParams
from outrider.load.text_decoder import BYTE_ALPHABET, STRAY, TextDecoder, Vocabulary, decode_all
from outrider.load.tokenizer import Tokenizer as CheckpointTokenizer

WORDS = ["▁the", "▁", "▁▁", "the", "e", "▁é", "日", "▁日本", ".", "'s", "##e", "e</w>", "the</w>"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ã", "©"), ("æ", "Ĺ"), ("Ģ", "æ"), ("t", "h")]
    vocab = {letter: token for token, letter in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<｜end▁of▁text｜>"])
    tokenizer.add_tokens(["[INST]", AddedToken("日本 x")])
    return tokenizer


def _llama2(*last: Any) -> Tokenizer:
    """Llama 2's and Gemma's way: words with a mark for the space before them, bytes for what is no word."""
    written = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {word: token for token, word in enumerate(written)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["[INST]"])
    return tokenizer


def _words(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level in a sequence": lambda: _with(byte_level(), decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    "bytes in a sequence of its own": lambda: _with(
        byte_level(), decoders.Sequence([decoders.Replace("zzz", "z"), decoders.ByteLevel()])
    ),
    "llama 2": lambda: _llama2(decoders.Strip(" ", 1, 0)),
    "strips two": lambda: _llama2(decoders.Strip(" ", 2, 0)),
    "gemma": _llama2,
    "metaspace always": lambda: _words(decoders.Metaspace(prepend_scheme="always")),
    "metaspace never": lambda: _words(decoders.Metaspace(prepend_scheme="never")),
    "wordpiece": lambda: _words(decoders.WordPiece()),
    "suffixes": lambda: _words(decoders.BPEDecoder()),
    "no decoder": lambda: _words(None),
}
STREAMS = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _with(tokenizer: Tokenizer, decoder: Any) -> Tokenizer:
    tokenizer.decoder = decoder
    return tokenizer


@pytest.fixture(scope="module", params=TOKENIZERS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def streamed(backend: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> str:
    decoder = TextDecoder(Vocabulary(backend), prompt, skip)
    return "".join([decoder.step(token) for token in output]) + decoder.finish()


def ids_of(backend: Tokenizer, draw: st.DataObject, label: str) -> list[int]:
    """Random ids, some past the vocabulary; or those of a text, among which no byte is stray."""
    if draw.draw(st.booleans(), label=f"{label} is a text"):
        text = draw.draw(st.text("the é日😀 \n'.", max_size=8), label=label)
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids
    return draw.draw(st.lists(st.integers(0, backend.get_vocab_size() + 3), max_size=24), label=label)


@STREAMS
@given(draw=st.data(), skip=st.booleans())
def test_what_comes_is_one_decode_less_the_prompt(backend: Tokenizer, draw: st.DataObject, skip: bool) -> None:
    prompt, output = ids_of(backend, draw, "prompt"), ids_of(backend, draw, "output")
    text = streamed(backend, prompt, output, skip)
    before, whole = (backend.decode(ids, skip_special_tokens=skip) for ids in (prompt, prompt + output))
    if STRAY not in whole + before:
        assert whole.startswith(before), "no decoder rewrites what it wrote"
        assert text == whole[len(before) :]
    if not prompt:
        assert text == decode_all(Vocabulary(backend), output, skip)


@STREAMS
@given(draw=st.data(), cut=st.integers(1, 3))
def test_a_character_between_prompt_and_output_is_the_output_s(draw: st.DataObject, cut: int) -> None:
    for make in (byte_level, _llama2):
        backend = make()
        ids = backend.encode("e😀e", add_special_tokens=False).ids
        first = next(at for at in range(len(ids)) if STRAY in backend.decode(ids[: at + 1]))
        assert streamed(backend, ids[: first + cut], ids[first + cut :]) == "😀e"
        # what the prompt tells of a character that is never completed is no output
        assert streamed(backend, ids[: first + cut], ids[-1:]) == "e"


@pytest.mark.parametrize("name", ["llama 2", "gemma", "strips two"])
def test_a_stray_byte_is_marked_and_what_follows_is_decoded_on(name: str) -> None:
    backend = TOKENIZERS[name]()
    vocab = backend.get_vocab()
    newline, lead, the, space = vocab["<0x0A>"], vocab["<0xF0>"], vocab["▁the"], vocab["<0x20>"]
    assert streamed(backend, [the], [newline, lead, the]) == "\n� the"
    assert streamed(backend, [], [newline, lead, the]) == "\n� the"
    assert decode_all(Vocabulary(backend), [newline, lead, the], True) == "\n� the"
    e, three = vocab["e"], [vocab[f"<0x{byte:02X}>"] for byte in "日".encode()]
    assert streamed(backend, [e], [*three, lead, *three, space, the, lead]) == "日�日  the�"
    assert streamed(backend, [e], [*three[:2], the]) == "�� the", "a mark a byte, as ByteFallback has it"
    assert streamed(backend, [e, lead], [*three]) == "日"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(max_size=24))
def test_stray_bytes_of_a_byte_level_tokenizer_are_marked_as_its_decoder_does(data: bytes) -> None:
    letters = {byte: letter for letter, byte in gpt2_alphabet().items()}
    ids = [LEVEL.token_to_id(letters[byte]) for byte in data]
    assert streamed(LEVEL, [], ids) == LEVEL.decode(ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(max_size=24))
def test_bytes_beside_a_stray_one_are_kept(data: bytes) -> None:
    ids = [FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in data]
    marked = streamed(FALLBACK, [FALLBACK.token_to_id("e")], ids)
    assert marked == "".join(
        STRAY if 0xDC80 <= ord(letter) <= 0xDCFF else letter for letter in data.decode("utf-8", "surrogateescape")
    )


def gpt2_alphabet() -> dict[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


LEVEL, FALLBACK = byte_level(), _llama2(decoders.Strip(" ", 1, 0))


def test_the_byte_alphabet_is_gpt_2_s() -> None:
    assert gpt2_alphabet() == BYTE_ALPHABET


@pytest.mark.parametrize("name", ["llama 2", "gemma", "metaspace always"])
def test_text_that_was_made_before_is_made_again(name: str) -> None:
    backend = TOKENIZERS[name]()
    vocabulary, ids = Vocabulary(backend), [backend.token_to_id(word) for word in ("▁the", "e", "▁é", "▁the", "e")]
    for prompt in ([], ids[:1], []):
        decoder = TextDecoder(vocabulary, prompt, True)
        whole = backend.decode([*prompt, *ids, *ids])
        assert "".join(decoder.step(token) for token in ids * 2) == whole[len(backend.decode(prompt)) :]
    assert vocabulary.pieces


def test_a_character_is_told_as_soon_as_it_is_whole() -> None:
    for backend in (LEVEL, FALLBACK):
        decoder = TextDecoder(Vocabulary(backend), backend.encode("e").ids, True)
        pieces = [decoder.step(token) for token in backend.encode("日e", add_special_tokens=False).ids]
        assert next(piece for piece in pieces if piece.strip()) == "日"


def test_byte_fallback_harms_no_request(tmp_path: Path) -> None:
    # random weights over bytes: most outputs are no text
    checkpoints.write(tmp_path, vocab_size=272)
    PreTrainedTokenizerFast(
        tokenizer_object=FALLBACK, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    with LLM(str(tmp_path), max_model_len=96, max_num_seqs=8) as llm:
        sampling = SamplingParams(n=4, seed=3, temperature=1.0, max_tokens=40, ignore_eos=True)
        prompts = [{"prompt_token_ids": [1, 259 + salt]} for salt in range(4)]
        completions = [one for output in llm.generate(prompts, sampling) for one in output.outputs]
        pieces = [piece for prompt in prompts for piece in llm.stream(prompt, sampling)]
    assert len(completions) == 16 and all(one.finish_reason == "length" for one in completions)
    assert sum(STRAY in one.text for one in completions) > 8, "these random bytes were to be no clean text"
    assert sorted("".join(one.text for one in completions)) == sorted("".join(piece.text for piece in pieces))
    tokenizer = CheckpointTokenizer(tmp_path)
    assert all(tokenizer.decode([259, *one.token_ids]) == f"the{one.text}" for one in completions[:4])
