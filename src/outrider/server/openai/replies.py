"""An assistant's replies, as chat completions and responses read them from a completion's text."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from outrider.engine.generation import AsyncGeneration
from outrider.errors import FieldError
from outrider.server.openai.output_parsers import ReplyParser
from outrider.server.openai.schemas import Sampling
from outrider.server.tokenizer_service import TokenizerService


def text_defaults(tokenizer: TokenizerService, asked: Sampling, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sampling parameters that keep every tag in the text. FieldError for tools that cannot be had."""
    if tools:
        tokenizer.output_parsers.check_tools()
    hidden = tokenizer.output_parsers.hides(with_tools=bool(tools))
    if hidden is None:
        return {}
    if asked.skip_special_tokens:
        said = f"skip_special_tokens true hides {hidden}, which is to be read: leave it out"
        raise FieldError(said, "skip_special_tokens")
    return {"skip_special_tokens": False}


def reply_parsers(
    tokenizer: TokenizerService, generation: AsyncGeneration, tools: Sequence[dict[str, Any]], parallel: bool | None
) -> list[ReplyParser]:
    """A parser for each completion of a generation."""
    names = frozenset(tool["function"]["name"] for tool in tools)
    max_calls = 1 if parallel is False else None
    return [
        tokenizer.output_parsers.reply(one.parent.prompt_token_ids, names, max_calls) for one in generation.completions
    ]


def call_id() -> str:
    """An id for a call, for the message that brings its result."""
    return f"call_{uuid.uuid4().hex[:24]}"


def num_reasoning_tokens(
    tokenizer: TokenizerService, generation: AsyncGeneration, replies: Sequence[ReplyParser]
) -> int:
    """Tokens of reasoning in all completions of a generation that has ended."""
    return sum(
        tokenizer.output_parsers.num_reasoning_tokens(completion.output.token_ids)
        for completion, reply in zip(generation.completions, replies, strict=True)
        if reply.has_reasoning
    )
