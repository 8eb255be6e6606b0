"""Text to tokens and back: what a client sends on a thread of its own, what the engine writes as it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from outrider.core.request import check_prompt_length
from outrider.core.sampling import SamplingParams
from outrider.engine.conversation import conversation_text
from outrider.engine.detokenize import Detokenizer
from outrider.engine.process.messages import Facts
from outrider.engine.prompts import as_conversations, as_prompts, as_token_ids, check_token_ids
from outrider.errors import PromptError
from outrider.load.tokenizer import Tokenizer
from outrider.server.lanes import SMALL, Lanes
from outrider.server.openai.output_parsers import OutputParsers

logger = logging.getLogger("outrider")

Made = TypeVar("Made")

CHAT_REMEDY = "send a plain prompt to /v1/completions, or start the server with --chat-template FILE"
"""What can be done where no chat template serves."""


class TokenizerService:
    """A checkpoint's tokenizer for a server.

    What a request brings may take long: threads work on it, by its size. The event loop has a tokenizer of its own,
    by which it decodes a few tokens at a time.
    """

    def __init__(
        self,
        directory: Path,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Loads it. Raises CheckpointError, and OptionError for a template that is unreadable or rules a parser out."""
        self.decoder = Tokenizer(directory)
        self._encoder = Tokenizer(directory)
        self._chat_template = chat_template
        templates = self._encoder.chat_templates(chat_template)
        self.output_parsers = OutputParsers(self.decoder, templates.for_tools(), tool_call_parser, reasoning_parser)
        note = templates.fact().note
        if note is not None:
            logger.warning("chat template: %s", note)
        self._lanes = Lanes()

    async def read(self, num_bytes: int, work: Callable[[], Made]) -> Made:
        """Does Python work over so many bytes of a request: here and now if they are few."""
        if num_bytes <= SMALL:
            return work()
        return await self._lanes.reading.run(work)

    async def encode(self, text: str, add_special_tokens: bool = True, limit: int | None = None) -> list[int]:
        """Token ids of a text. PromptError for `limit` of them or more."""
        return await self._lanes.encoding(len(text)).run(lambda: self._encoder.encode(text, add_special_tokens, limit))

    async def prompts(
        self,
        given: Any,
        facts: Facts,
        check_count: Callable[[int], None],
        with_texts: bool = False,
        num_bytes: int = 0,
    ) -> list[tuple[str | None, list[int]]]:
        """What a completion request names: a text, token ids, or a list of either. PromptError for what is none.

        `check_count` is called with their number before any is encoded; the first that is too long ends it.
        `with_texts`: token ids come with their text too. `num_bytes`: of the request.
        """
        lane = self._lanes.encoding(0) if num_bytes <= SMALL else self._lanes.reading
        listed = await lane.run(lambda: self._listed(given, facts, check_count, with_texts))
        prompts: list[tuple[str | None, list[int]]] = []
        for text, ids in listed:
            if ids is None:
                assert text is not None
                ids = await self.encode(text, limit=facts.max_model_len)
            prompts.append((text, ids))
        return prompts

    def _listed(
        self, given: Any, facts: Facts, check_count: Callable[[int], None], with_texts: bool
    ) -> list[tuple[str | None, list[int] | None]]:
        """The prompts, those that are text not encoded yet."""
        if given is None or isinstance(given, Mapping):
            raise PromptError("prompt must be text, token ids, or a list of either", "prompt")
        listed = as_prompts(given)
        if not listed:
            raise PromptError("the prompt is empty: give at least one", "prompt")
        check_count(len(listed))
        prompts: list[tuple[str | None, list[int] | None]] = []
        for prompt in listed:
            if isinstance(prompt, str):
                prompts.append((prompt, None))
                continue
            if isinstance(prompt, list):
                check_prompt_length(len(prompt), facts.max_model_len)
            ids = as_token_ids(prompt)
            prompts.append((self._decoded(ids, facts.vocab_size) if with_texts else None, ids))
        return prompts

    async def contexts(
        self, prompts: Sequence[Sequence[int]], vocab_size: int, skip_special_tokens: bool
    ) -> list[list[int]]:
        """The end of each prompt, for `detokenizer`. PromptError for the first token that the model does not have."""

        def check() -> list[list[int]]:
            for ids in prompts:
                check_token_ids(ids, vocab_size)
            return [self._encoder.context(ids, skip_special_tokens) for ids in prompts]

        return await self._lanes.encoding(sum(map(len, prompts))).run(check)

    async def conversation(
        self, messages: Any, *, limit: int | None = None, num_bytes: int = 0, **how: Any
    ) -> list[int]:
        """Token ids of a conversation, ready for the answer; `how` is of `conversation_text`.

        `limit`: as `encode` takes it. `num_bytes`: of the request. PromptError for a conversation that cannot be shown
        to the model whole.
        """

        def text() -> str:
            conversations = as_conversations(messages)
            if len(conversations) != 1 or conversations[0] is not messages:
                raise PromptError("messages must be one conversation", "messages")
            template = self._chat_template
            return conversation_text(self._encoder, messages, remedy=CHAT_REMEDY, chat_template=template, **how)

        lane = self._lanes.encoding(0) if num_bytes <= SMALL else self._lanes.reading
        return await self.encode(await lane.run(text), add_special_tokens=False, limit=limit)

    async def decode(self, ids: Sequence[int], vocab_size: int) -> str:
        """The text of token ids, special tokens included. PromptError for one outside the model's vocabulary."""
        return await self._lanes.encoding(len(ids)).run(lambda: self._decoded(ids, vocab_size))

    def _decoded(self, ids: Sequence[int], vocab_size: int) -> str:
        check_token_ids(ids, vocab_size)
        return self._encoder.decode(ids, skip_special_tokens=False)

    async def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary has it."""
        return await self._lanes.encoding(len(ids)).run(
            lambda: list(self._encoder.wrapped.convert_ids_to_tokens(list(ids)))
        )

    def detokenizer(self, context: Sequence[int], params: SamplingParams) -> Detokenizer:
        """What turns a completion's tokens to text. `context`: of its prompt."""
        return Detokenizer.of(self.decoder, context, params)

    def close(self) -> None:
        """Ends the threads."""
        self._lanes.close()
