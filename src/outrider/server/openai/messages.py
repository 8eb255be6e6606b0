"""The messages of a conversation, as a chat template takes them. Whatever a template might pass over is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outrider.core.sampling_fields import NONE_OR_EMPTY
from outrider.errors import PromptError, shortened
from outrider.server.openai.schemas import ROLES

_TAKEN = {
    "assistant": ("role", "content", "tool_calls", "reasoning", "reasoning_content"),
    "tool": ("role", "content", "tool_call_id"),
}


def plain_conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each message with its content as text and its calls' arguments as records. PromptError for what cannot be shown.

    A developer's message is a system's: it is what OpenAI calls it now.
    """
    plain: list[dict[str, Any]] = []
    call_ids: set[str] = set()
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        made = _message(message, where)
        if made["role"] == "tool":
            answered = made["tool_call_id"]
            if answered not in call_ids:
                said = f"tool_call_id {shortened(repr(answered))} is of no call in the messages before"
                raise PromptError(said, f"{where}.tool_call_id")
        call_ids.update(call["id"] for call in made.get("tool_calls", ()))
        plain.append(made)
    return plain


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"role must be one of {', '.join(ROLES)}: {shortened(repr(role))}", f"{where}.role")
    taken = _TAKEN.get(role, ("role", "content"))
    for name, value in message.items():
        if name not in taken and value not in NONE_OR_EMPTY:
            raise PromptError(f"{shortened(name)} of a message of role {role} is not offered: leave it out", where)
    plain: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    plain["content"] = "" if content is None and calls else text_of(content, f"{where}.content")
    if role == "assistant":
        plain |= _reasoning(message, where)
    if calls:
        if not isinstance(calls, list):
            raise PromptError("tool_calls must be a list", f"{where}.tool_calls")
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls.{index}") for index, call in enumerate(calls)]
    if role == "tool":
        plain["tool_call_id"] = _text(message.get("tool_call_id"), f"{where}.tool_call_id")
    return plain


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """Content as text: it is text, or a list of parts of one of these types."""
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.{index}", kinds) for index, part in enumerate(content))
    if not isinstance(content, str):
        raise PromptError(f"content must be text, or a list of parts of type {' or '.join(kinds)}", where)
    return content


def _part(part: Any, where: str, kinds: Sequence[str]) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in kinds else None
    if not isinstance(text, str):
        said = f'a part of a message must be {{"type": "{kinds[0]}", "text": ...}}: only text is offered'
        raise PromptError(said, where)
    for name, value in part.items():
        if name not in ("type", "text") and value not in NONE_OR_EMPTY:
            raise PromptError(f"a part of a message has no {shortened(name)}", where)
    return text


def _reasoning(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """Reasoning of an earlier answer, under either name, as templates call it."""
    names = [name for name in ("reasoning", "reasoning_content") if message.get(name) not in NONE_OR_EMPTY]
    texts = [_text(message[name], f"{where}.{name}") for name in names]
    if len(set(texts)) > 1:
        raise PromptError("reasoning contradicts reasoning_content: give one", f"{where}.reasoning")
    return {"reasoning_content": texts[0]} if texts else {}


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as templates take it: its arguments as a record, not as the text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        said = 'a tool call must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise PromptError(said, where)
    for given, known in ((call, ("id", "type", "function", "index")), (function, ("name", "arguments"))):
        unknown = [name for name, value in given.items() if name not in known and value not in NONE_OR_EMPTY]
        if unknown:
            raise PromptError(f"a tool call has no {shortened(unknown[0])}", where)
    name = _text(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    return {
        "id": _text(call.get("id"), f"{where}.id"),
        "type": "function",
        "function": {"name": name, "arguments": _arguments(arguments, f"{where}.function.arguments")},
    }


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, TypeError, UnicodeError, RecursionError):
        raise PromptError(
            f"arguments must be the JSON text of an object: {shortened(repr(arguments))}", where
        ) from None
    return record


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise PromptError(
            f"{where.rpartition('.')[2]} must be a text that is not empty: {shortened(repr(value))}", where
        )
    return value
