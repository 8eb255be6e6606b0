"""Tokenizer and chat template, as transformers reads them. Imported only when text is involved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from outrider.core.request import check_prompt_length
from outrider.errors import CheckpointError, PromptError, shortened
from outrider.load.chat_template import ChatTemplates
from outrider.load.text_decoder import TextDecoder, Vocabulary, decode_all
from outrider.load.token_bounds import max_bytes_per_token
from outrider.load.tokenizer_cache import TokenizerCache

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these makes a tokenizer; transformers makes up an empty one where there is none."""


class Tokenizer:
    """A checkpoint's own tokenizer.

    transformers decides what the checkpoint's files mean. Importing it takes most of a second, so what it made of them
    is kept on disk: later starts read that, and import transformers only for chat templates and for `wrapped`.
    """

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError if the directory holds no fast tokenizer."""
        if not any((directory / name).exists() for name in FILES):
            raise CheckpointError(f"no tokenizer in {directory}: it holds none of {', '.join(FILES)}")
        self._directory = directory
        self._templates: dict[str | None, ChatTemplates] = {}
        cache = TokenizerCache.of(directory)
        kept = cache.read()
        if kept is None:
            cache.write(self.wrapped.backend_tokenizer)
        else:
            self._backend = kept
            self._vocabulary = Vocabulary(kept)

    @cached_property
    def wrapped(self) -> Any:
        """The transformers tokenizer itself, loaded at first use. CheckpointError if it has no fast form."""
        from transformers import AutoTokenizer
        from transformers.tokenization_utils_base import VERY_LARGE_INTEGER, PreTrainedTokenizerBase

        try:
            loaded = AutoTokenizer.from_pretrained(str(self._directory))
        except Exception as error:  # whatever two libraries run into in files that are damaged
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(
                f"no tokenizer in {self._directory}: transformers cannot read it, and says {shortened(first)!r}; are "
                "its files complete?"
            ) from error
        if not isinstance(loaded, PreTrainedTokenizerBase):
            raise CheckpointError(
                f"{self._directory}/tokenizer_config.json: tokenizer_class names {type(loaded).__name__}, which is no "
                "tokenizer: correct it there"
            )
        if not loaded.is_fast:
            raise CheckpointError(f"the tokenizer in {self._directory} has no tokenizer.json; convert it to a fast one")
        # the engine has a limit of its own; a config's may be none
        loaded.model_max_length = VERY_LARGE_INTEGER
        # one backend serves both, so that a large vocabulary is held once
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = Vocabulary(self._backend)
        return loaded

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` underneath."""
        return self._backend

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that stand for no text, by the way they are written."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True, limit: int | None = None) -> list[int]:
        """Token ids of a text; of a prompt, with the special tokens the model expects around it.

        `limit`: the engine's max_model_len. Raises PromptError for a text of as many tokens or more; where its bytes
        show that already, it is not encoded. PromptError too for one that the tokenizer cannot encode. Other threads
        run meanwhile.
        """
        try:
            num_bytes = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            raise PromptError("the text holds half of a surrogate pair, which is no character") from None
        if limit is not None and self._bytes_per_token is not None:
            check_prompt_length(-(-num_bytes // self._bytes_per_token), limit, is_lower_bound=True)
        try:
            # `encode` would keep Python's lock, and make the offsets of every token
            (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises no other: a character that its vocabulary does not have
            said = shortened(str(error))
            raise PromptError(
                f"the tokenizer in {self._directory.name} cannot encode the text, and says {said!r}: give token ids, "
                "or correct its tokenizer.json"
            ) from error
        if limit is not None:
            check_prompt_length(len(found), limit)
        ids: list[int] = found.ids
        return ids

    @cached_property
    def _bytes_per_token(self) -> int | None:
        return max_bytes_per_token(self._backend)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens. A byte that belongs to no character is U+FFFD."""
        return decode_all(self._vocabulary, list(ids), skip_special_tokens)

    def context(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> list[int]:
        """The end of a prompt, as far as it matters to the text that follows."""
        return self._vocabulary.context(prompt, skip_special_tokens)

    def text_decoder(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> TextDecoder:
        """What turns the tokens that follow a prompt to text as they come."""
        return TextDecoder(self._vocabulary, prompt, skip_special_tokens)

    def chat_templates(self, given: str | None = None) -> ChatTemplates:
        """The checkpoint's chat templates, or the one given. OptionError for one that cannot be read."""
        if given not in self._templates:
            self._templates[given] = ChatTemplates(self.wrapped, self._directory, given)
        return self._templates[given]
