"""Prompts to tokens, on a thread of their own, and tokens to text: neither is done where steps are run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from outrider.core.sampling import SamplingParams
from outrider.engine.detokenize import Detokenizer
from outrider.engine.prompts import as_conversations, as_prompts, as_template_arguments, as_token_ids, check_token_ids
from outrider.errors import PromptError
from outrider.load.tokenizer import Tokenizer
from outrider.server.conversation import plain_conversation
from outrider.server.dialect import Dialect


class Texts:
    """A checkpoint's tokenizer for a server.

    Encoding may take long, and a tokenizer cannot be used by two threads at once: so there is one for the
    thread that encodes, and one for the event loop, which decodes a few tokens at a time.
    """

    def __init__(
        self, directory: Path, tool_call_parser: str | None = None, reasoning_parser: str | None = None
    ) -> None:
        """Loads it. Raises CheckpointError, and OptionError for a parser that the chat template rules out."""
        self.decoder = Tokenizer(directory)
        self._encoder = Tokenizer(directory)
        self.dialect = Dialect(self.decoder, tool_call_parser, reasoning_parser)
        self._thread = ThreadPoolExecutor(1, "outrider-encode")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens:
            return await self._run(lambda: self._encoder.encode(text))
        return await self._run(lambda: list(self._encoder.wrapped.encode(text, add_special_tokens=False)))

    async def prompts(self, given: Any) -> list[tuple[str | None, list[int]]]:
        """What a completion request names: a text, token ids, or a list of either. PromptError for what is none."""
        if given is None or isinstance(given, Mapping):
            raise PromptError("prompt must be text, token ids, or a list of either", "prompt")
        prompts: list[tuple[str | None, list[int]]] = []
        for prompt in as_prompts(given):
            if isinstance(prompt, str):
                prompts.append((prompt, await self.encode(prompt)))
            else:
                prompts.append((None, as_token_ids(prompt)))
        if not prompts:
            raise PromptError("the prompt is empty: give at least one", "prompt")
        return prompts

    async def conversation(
        self,
        messages: Any,
        template_arguments: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, ready for the answer. PromptError for one that cannot be rendered whole."""
        conversations = as_conversations(messages)
        if len(conversations) != 1 or conversations[0] is not messages:
            raise PromptError("messages must be one conversation", "messages")
        plain = plain_conversation(messages)
        self.dialect.check_messages(plain)
        arguments = as_template_arguments(template_arguments)
        if "tools" in arguments:
            raise PromptError("chat_template_kwargs holds tools: give them as tools", "chat_template_kwargs")
        if tools:
            arguments["tools"] = [dict(tool) for tool in tools]
        return await self._run(lambda: self._encoder.render_chat(plain, **arguments))

    def decode(self, ids: Sequence[int], vocab_size: int) -> str:
        """The text of token ids, special tokens included. PromptError for one outside the model's vocabulary."""
        check_token_ids(ids, vocab_size)
        return self.decoder.decode(ids, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary has it."""
        pieces: list[str] = self.decoder.wrapped.convert_ids_to_tokens(list(ids))
        return pieces

    def detokenizer(self, prompt: list[int], params: SamplingParams) -> Detokenizer:
        """What turns a completion's tokens to text."""
        assert isinstance(params.stop, tuple)
        return Detokenizer(
            self.decoder, prompt, params.stop, params.include_stop_str_in_output, params.skip_special_tokens
        )

    async def _run(self, work: Callable[[], list[int]]) -> list[int]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except UnicodeEncodeError:
            raise PromptError("the text holds half of a surrogate pair, which is no character") from None

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
