"""The forms in which callers give prompts, conversations and sampling parameters, and what is wrong with them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from outrider.core.reading import written_short
from outrider.core.sampling import SamplingParams
from outrider.errors import PromptError, SamplingError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids} as in vLLM."""

Messages = Sequence[dict[str, Any]]
"""A conversation: [{"role": "user", "content": ...}, ...]."""


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several: numbers are one, and nothing at all is none."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    try:
        items = list(prompts)
    except TypeError:
        raise PromptError(
            f"prompts must be text, token ids, a record, or a list of those: {written_short(prompts)}"
        ) from None
    if items and all(_is_whole(item) for item in items):
        return [items]
    return items


def as_token_ids(ids: Any) -> list[int]:
    """Token ids as plain integers, numpy's included. PromptError naming the first that is none."""
    try:
        items = None if isinstance(ids, (str, bytes, Mapping)) else list(ids)
    except TypeError:
        items = None
    if items is None:
        raise PromptError(f"token ids must be a list of whole numbers: {written_short(ids)}")
    for index, item in enumerate(items):
        if isinstance(item, bool) or not _is_whole(item):
            raise PromptError(f"token ids must be whole numbers: {written_short(item)} at index {index}")
    return [operator.index(item) for item in items]


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises PromptError for the first token of a prompt that the model does not have."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"token id {written_short(token)} is outside the vocabulary of {vocab_size}, at index {index} of the"
                " prompt"
            )


def check_stop_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises SamplingError for a stop token that the model does not have."""
    for token in sampling.stop_token_ids or ():
        if token >= vocab_size:
            raise SamplingError(
                f"stop token id {written_short(token)} is outside the vocabulary of {vocab_size}: drop it",
                "stop_token_ids",
            )


def as_conversations(messages: Any) -> list[Messages]:
    """One conversation or several. PromptError for what is none."""
    several = messages if isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)) else None
    if several is None:
        raise PromptError(
            f'a conversation must be a list of {{"role": ..., "content": ...}}: {written_short(messages)}'
        )
    if not several:
        raise PromptError("the conversation is empty: give at least one message")
    conversations = [several] if isinstance(several[0], Mapping) else list(several)
    for conversation in conversations:
        listed = isinstance(conversation, Sequence) and not isinstance(conversation, (str, bytes))
        wrong = [one for one in conversation if not isinstance(one, Mapping)] if listed else [conversation]
        if wrong:
            raise PromptError(f'a message must be a record {{"role": ..., "content": ...}}: {written_short(wrong[0])}')
        if not conversation:
            raise PromptError("the conversation is empty: give at least one message")
    return conversations


def as_template_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a chat template. PromptError for what is no record."""
    if given is not None and not isinstance(given, Mapping):
        raise PromptError(f"chat_template_kwargs must be a record: {written_short(given)}")
    return dict(given or {})


def one_each(given: Any, count: int, default: SamplingParams) -> list[SamplingParams]:
    """Sampling parameters for each of so many prompts, given none, one for all, or one each."""
    if given is None:
        return [default] * count
    if isinstance(given, SamplingParams):
        return [given] * count
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    wrong = [one for one in given if not isinstance(one, SamplingParams)] if listed else [given]
    if wrong:
        raise SamplingError(f"sampling_params must be SamplingParams, or one each: {written_short(wrong[0])}")
    if len(given) != count:
        raise SamplingError(f"{len(given)} sampling params for {count} prompts: give one, or one each")
    return list(given)


def _is_whole(value: Any) -> bool:
    if type(value) is int:
        return True
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
