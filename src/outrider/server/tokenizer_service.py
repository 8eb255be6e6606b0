"""Text to tokens and back: what a client sends on a thread of its own, what the engine writes as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from outrider.core.request import check_prompt_length
from outrider.core.sampling import SamplingParams
from outrider.engine.conversation import encode_conversation
from outrider.engine.detokenize import Detokenizer
from outrider.engine.process.messages import Facts
from outrider.engine.prompts import as_conversations, as_prompts, as_token_ids, check_token_ids
from outrider.errors import PromptError
from outrider.load.tokenizer import Tokenizer
from outrider.server.openai.output_parsers import OutputParsers

logger = logging.getLogger("outrider")

Made = TypeVar("Made")

CHAT_REMEDY = "send a plain prompt to /v1/completions, or start the server with --chat-template FILE"
"""What can be done where no chat template serves."""


class TokenizerService:
    """A checkpoint's tokenizer for a server.

    What a request brings may take long, and a tokenizer cannot be used by two threads at once: so there is one for
    the thread that works on requests, and one for the event loop, which decodes a few tokens at a time.
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
        self._thread = ThreadPoolExecutor(1, "outrider-encode")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return await self._run(lambda: self._encoder.encode(text, add_special_tokens))

    async def prompts(
        self, given: Any, facts: Facts, check_count: Callable[[int], None], with_texts: bool = False
    ) -> list[tuple[str | None, list[int]]]:
        """What a completion request names: a text, token ids, or a list of either. PromptError for what is none.

        `check_count` is called with their number before any is encoded; the first that is too long ends it.
        `with_texts`: token ids come with their text too.
        """
        return await self._run(lambda: self._prompts(given, facts, check_count, with_texts))

    def _prompts(
        self, given: Any, facts: Facts, check_count: Callable[[int], None], with_texts: bool
    ) -> list[tuple[str | None, list[int]]]:
        if given is None or isinstance(given, Mapping):
            raise PromptError("prompt must be text, token ids, or a list of either", "prompt")
        listed = as_prompts(given)
        if not listed:
            raise PromptError("the prompt is empty: give at least one", "prompt")
        check_count(len(listed))
        prompts: list[tuple[str | None, list[int]]] = []
        for prompt in listed:
            if isinstance(prompt, str):
                text, ids = prompt, self._encoder.encode(prompt)
                check_prompt_length(len(ids), facts.max_model_len)
            else:
                if isinstance(prompt, list):
                    check_prompt_length(len(prompt), facts.max_model_len)
                text, ids = None, as_token_ids(prompt)
                if with_texts:
                    text = self._decoded(ids, facts.vocab_size)
            prompts.append((text, ids))
        return prompts

    async def check_ids(self, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Raises PromptError for the first token that the model does not have."""

        def check() -> None:
            for ids in prompts:
                check_token_ids(ids, vocab_size)

        await self._run(check)

    async def conversation(self, messages: Any, **how: Any) -> list[int]:
        """Token ids of a conversation, ready for the answer; `how` is of `encode_conversation`.

        PromptError for one that cannot be shown to the model whole.
        """
        conversations = as_conversations(messages)
        if len(conversations) != 1 or conversations[0] is not messages:
            raise PromptError("messages must be one conversation", "messages")
        template = self._chat_template
        return await self._run(
            lambda: encode_conversation(self._encoder, messages, remedy=CHAT_REMEDY, chat_template=template, **how)
        )

    async def decode(self, ids: Sequence[int], vocab_size: int) -> str:
        """The text of token ids, special tokens included. PromptError for one outside the model's vocabulary."""
        return await self._run(lambda: self._decoded(ids, vocab_size))

    def _decoded(self, ids: Sequence[int], vocab_size: int) -> str:
        check_token_ids(ids, vocab_size)
        return self._encoder.decode(ids, skip_special_tokens=False)

    async def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary has it."""
        return await self._run(lambda: list(self._encoder.wrapped.convert_ids_to_tokens(list(ids))))

    def detokenizer(self, prompt: Sequence[int], params: SamplingParams) -> Detokenizer:
        """What turns a completion's tokens to text."""
        return Detokenizer.of(self.decoder, prompt, params)

    async def _run(self, work: Callable[[], Made]) -> Made:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except UnicodeEncodeError:
            raise PromptError("the text holds half of a surrogate pair, which is no character") from None

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
