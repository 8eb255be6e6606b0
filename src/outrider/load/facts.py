"""Facts that several files of a checkpoint may state: each has one reader, which lists every place and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.core.reading import Fact, Reader
from outrider.core.sampling import MAX_STOP_IDS, SamplingParams
from outrider.errors import CheckpointError, SamplingError
from outrider.load.checkpoint import INDEX, SINGLE, Checkpoint, read_json, weight_files

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling parameters of a generation_config.json that requests take as their defaults, as in vLLM."""

ASKS_NOTHING = {"repetition_penalty": 1}
"""Values that need no mention where the engine does not offer the parameter."""


def end_of_text(directory: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, ...], Fact]:
    """Every token that ends a text: config.json's, generation_config.json's and the tokenizer's, together.

    A checkpoint may name the end of a text in one place and the end of a turn in another. CheckpointError for ids that
    are none, and for more of them than the engine takes.
    """
    said: dict[str, Sequence[int]] = {}
    notes = []
    for file, ids in (
        ("config.json", Reader(config).token_ids("eos_token_id")),
        (
            GENERATION_CONFIG,
            Reader(_optional(directory / GENERATION_CONFIG), GENERATION_CONFIG).token_ids("eos_token_id"),
        ),
    ):
        if ids:
            said[file] = ids
    for file, written in _named_ends(directory):
        token = _token_id(directory, written)
        if token is None:
            notes.append(f"{file} names {written!r}, which is no token of the vocabulary")
        else:
            said[file] = (*said.get(file, ()), token)
    union = list(dict.fromkeys(token for ids in said.values() for token in ids))
    taken = tuple(token for token in union if token < vocab_size)
    if len(taken) < len(union):
        beyond = ", ".join(str(token) for token in union if token >= vocab_size)
        notes.append(f"{beyond} is outside the vocabulary of {vocab_size}, and never comes")
    if len(taken) > MAX_STOP_IDS:
        raise CheckpointError(
            f"{directory} names {len(taken)} end-of-text tokens: at most {MAX_STOP_IDS} are supported"
        )
    by_file = {file: list(ids) for file, ids in said.items()}
    return taken, Fact("end of text", list(taken), by_file, "; ".join(notes) or None)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _named_ends(directory: Path) -> list[tuple[str, str]]:
    """The tokens that the tokenizer's files name as an end, with the file."""
    found: list[tuple[str, str]] = []
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        held = Reader(_optional(directory / file), file)
        for key in ("eos_token", "eot_token"):
            value = held.values.get(key)
            if value is None:
                continue
            written = held.inner(key).text("content") if isinstance(value, Mapping) else held.text(key)
            if (file, written) not in found:
                found.append((file, written))
    return found


def _token_id(directory: Path, written: str) -> int | None:
    """A token's id by the way it is written; None if the tokenizer's files have no such token."""
    added = Reader(_optional(directory / TOKENIZER_CONFIG), TOKENIZER_CONFIG).inner("added_tokens_decoder").values
    for token, entry in added.items():
        if isinstance(entry, Mapping) and entry.get("content") == written and str(token).isdecimal():
            return int(token)
    tokenizer = Reader(_optional(directory / "tokenizer.json"), "tokenizer.json")
    listed = tokenizer.values.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, Mapping) and entry.get("content") == written and isinstance(entry.get("id"), int):
            return int(entry["id"])
    vocab: Any = tokenizer.inner("model").values.get("vocab")
    if isinstance(vocab, list):  # a Unigram model: pieces with their scores
        vocab = {pair[0]: at for at, pair in enumerate(vocab) if isinstance(pair, list) and pair[:1] == [written]}
    found = vocab.get(written) if isinstance(vocab, Mapping) else None
    return found if isinstance(found, int) else None


def weights(checkpoint: Checkpoint, is_tied: bool) -> tuple[Fact, ...]:
    """Which files hold the weights, and what config and files say of the head; nothing where no file is there."""
    directory = checkpoint.directory
    single, index = (directory / name for name in (SINGLE, INDEX))
    if not single.exists() and not index.exists():
        return ()
    taken = [file.name for file in weight_files(directory)]
    said = {file.name: "is there" for file in (single, index) if file.exists()}
    note = None
    if len(said) == 2 and taken == [SINGLE]:
        note = f"{SINGLE} is taken and {INDEX} is not, as transformers does: remove one of them"
    heads = [
        name for name in checkpoint.tensors if name.removeprefix("model.") in ("embed_tokens.weight", "lm_head.weight")
    ]
    of_config = checkpoint.config.get("tie_word_embeddings")
    own = None
    if of_config and not is_tied:
        own = (
            "config.json ties head and embedding, but the weight files hold different matrices: each is taken, as "
            "transformers does; set tie_word_embeddings to false, or remove lm_head.weight"
        )
    return (
        Fact("weight files", taken, said, note),
        Fact(
            "head",
            "the embedding's matrix" if is_tied else "its own matrix",
            {
                "config.json's tie_word_embeddings": "nothing" if of_config is None else of_config,
                "the weight files": f"{', '.join(sorted(heads)) or 'nothing'}",
            },
            own,
        ),
    )


def sampling_defaults(directory: Path, used: bool) -> tuple[dict[str, Any], Fact]:
    """What generation_config.json gives requests that do not say otherwise, as in vLLM; nothing unless `used`.

    CheckpointError for a value that no request could have.
    """
    held = _optional(directory / GENERATION_CONFIG)
    listed = {key: held[key] for key in SAMPLING_KEYS if held.get(key) not in (None, ASKS_NOTHING.get(key))}
    given = {key: value for key, value in listed.items() if key in SamplingParams.__dataclass_fields__}
    said = {GENERATION_CONFIG: listed} if listed else {}
    if not used:
        return {}, Fact("sampling defaults", {}, said)
    try:
        SamplingParams(**given)
    except SamplingError as error:
        remedy = "correct it there, or leave all out with generation_config none"
        raise CheckpointError(f"{GENERATION_CONFIG}: {error}; {remedy}") from None
    notes = []
    if given:
        values = ", ".join(f"{key} {value}" for key, value in given.items())
        notes.append(f"requests that do not say otherwise take {values}; generation_config none turns that off")
    notes += [f"{key} {listed[key]} is not offered yet and left out" for key in listed if key not in given]
    return given, Fact("sampling defaults", given, said, "; ".join(notes) or None)
