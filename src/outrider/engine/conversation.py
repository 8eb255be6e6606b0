"""The messages of a conversation, made plain for a chat template. What a template might pass over is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from outrider.core.reading import written_short
from outrider.engine.hints import note_hint
from outrider.engine.prompts import as_template_arguments
from outrider.errors import PromptError, shortened
from outrider.load.chat_template import Message, text_of
from outrider.load.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_READ = {
    "assistant": (
        "role",
        "content",
        "name",
        "tool_calls",
        "function_call",
        "refusal",
        "reasoning",
        "reasoning_content",
    ),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_OTHERS_READ = ("role", "content", "name")

HINTS: Mapping[str, tuple[type, ...]] = {
    "id": (str,),
    "refusal": (str,),
    "annotations": (list,),
    "cache_control": (dict,),
    "prompt_cache_breakpoint": (dict,),
    "provider_specific_fields": (dict,),
    "parsed": (object,),
    "parsed_arguments": (object,),
}
"""What clients add to messages, their parts and their calls, and which changes nothing; with the types it may have."""

_WORDS: Mapping[type, str] = {str: "text", list: "a list", dict: "an object"}

EMPTY: tuple[Any, ...] = (None, [], {}, "")


def plain_conversation(messages: Sequence[Mapping[str, Any]], takes_records: bool = False) -> list[Message]:
    """Each message with its content as text or a list of texts, and its calls' arguments as records.

    `takes_records`: whether arguments may be given as records too, as templates take them. A developer's message is a
    system's, and a function's is a tool's: OpenAI renamed both. PromptError for what cannot be shown.
    """
    plain: list[Message] = []
    names: dict[str, str] = {}  # of the functions called so far, by the id of the call
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        role = message.get("role")
        if role not in ROLES:
            raise PromptError(f"role must be one of {', '.join(ROLES)}: {written_short(role)}", f"{where}.role")
        check_fields(message, _READ.get(role, _OTHERS_READ), where, f"a message of role {role}")
        if role == "assistant":
            made = _answer(message, where, takes_records)
            names |= {call["id"]: call["function"]["name"] for call in made.get("tool_calls", ())}
        elif role in ("tool", "function"):
            made = _result(message, where, names)
        else:
            made = {"role": "system" if role == "developer" else role}
            made["content"] = content_of(message.get("content"), f"{where}.content")
        name = message.get("name")
        if name is not None and role != "function":
            made["name"] = text_at(name, f"{where}.name")
            note_hint(f"name of a message of role {role}", "a chat template shows it where it reads it")
        plain.append(made)
    return plain


def _answer(message: Mapping[str, Any], where: str, takes_records: bool) -> Message:
    content, refusal = message.get("content"), message.get("refusal")
    if refusal not in EMPTY and content in EMPTY:
        content = text_at(refusal, f"{where}.refusal")  # an answer all the same, and the only text there is
    made: Message = {"role": "assistant"}
    made["content"] = "" if content is None else content_of(content, f"{where}.content", ("text", "refusal"))
    made |= _reasoning(message, where)
    calls, older = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not isinstance(calls, list):
        raise PromptError("tool_calls must be a list", f"{where}.tool_calls")
    if older is not None:
        if calls:
            raise PromptError("function_call contradicts tool_calls: give one", f"{where}.function_call")
        call = {"id": f"call_{where.rpartition('.')[2]}", "function": older}
        made["tool_calls"] = [_call(call, f"{where}.function_call", takes_records, "")]
    elif calls:
        made["tool_calls"] = [
            _call(call, f"{where}.tool_calls.{index}", takes_records) for index, call in enumerate(calls)
        ]
    return made


def _result(message: Mapping[str, Any], where: str, names: Mapping[str, str]) -> Message:
    """The result of a call: of the one with its id, or for role function of the last one by its name."""
    if message.get("role") == "function":
        name = text_at(message.get("name"), f"{where}.name")
        call_id = next((call for call, called in reversed(list(names.items())) if called == name), None)
        if call_id is None:
            said = f"name {written_short(name)} is of no function called in the messages before"
            raise PromptError(said, f"{where}.name")
    else:
        call_id = text_at(message.get("tool_call_id"), f"{where}.tool_call_id")
        if call_id not in names:
            said = f"tool_call_id {written_short(call_id)} is of no call in the messages before"
            raise PromptError(said, f"{where}.tool_call_id")
    content = content_of(message.get("content"), f"{where}.content")
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": names[call_id]}


def content_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str | list[str]:
    """Content as text, or as a list of texts where it is a list of parts of one of these types."""
    if isinstance(content, list):
        return [_part(part, f"{where}.{index}", kinds) for index, part in enumerate(content)]
    if not isinstance(content, str):
        raise PromptError(f"content must be text, or a list of parts of type {' or '.join(kinds)}", where)
    return content


def _part(part: Any, where: str, kinds: Sequence[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    of_text = "refusal" if kind == "refusal" else "text"
    text = part.get(of_text) if isinstance(part, dict) and kind in kinds else None
    if not isinstance(text, str):
        said = f'a part of a message must be {{"type": "{kinds[0]}", "text": ...}}: only text is offered'
        raise PromptError(said, where)
    check_fields(part, ("type", of_text), where, "a part of a message", {**HINTS, "logprobs": (list,)})
    return text


def check_fields(
    given: Mapping[str, Any], read: Sequence[str], where: str, what: str, hints: Mapping[str, tuple[type, ...]] = HINTS
) -> None:
    """Names each hint once in the log. PromptError for one of a wrong type, and for a field that is unknown."""
    for name, value in given.items():
        if name in read or value in EMPTY:
            continue
        if name not in hints:
            raise PromptError(f"{shortened(name)} of {what} is not offered: leave it out", where)
        if not isinstance(value, hints[name]):
            said = f"{name} must be {_WORDS[hints[name][0]]}: {written_short(value)}"
            raise PromptError(said, f"{where}.{name}")
        note_hint(f"{name} of {what}")


def _reasoning(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """Reasoning of an earlier answer, under either name, as templates call it."""
    names = [name for name in ("reasoning", "reasoning_content") if message.get(name) not in EMPTY]
    texts = [text_at(message[name], f"{where}.{name}") for name in names]
    if len(set(texts)) > 1:
        raise PromptError("reasoning contradicts reasoning_content: give one", f"{where}.reasoning")
    return {"reasoning_content": texts[0]} if texts else {}


def _call(call: Any, where: str, takes_records: bool, inner: str = ".function") -> Message:
    """A call as templates take it: its arguments as a record, not as the text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        said = 'a tool call must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise PromptError(said, where)
    check_fields(call, ("id", "type", "function", "index"), where, "a tool call")
    check_fields(function, ("name", "arguments"), where, "a tool call")
    name = text_at(function.get("name"), f"{where}{inner}.name")
    arguments = _arguments(function.get("arguments"), f"{where}{inner}.arguments", takes_records)
    call_id = text_at(call.get("id"), f"{where}.id")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: Any, where: str, takes_records: bool) -> dict[str, Any]:
    if takes_records and isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        record = json.loads(arguments or "{}", parse_constant=_no_number)
        if isinstance(record, dict):
            return record
    except (TypeError, ValueError, RecursionError):
        pass
    raise PromptError(f"arguments must be the JSON text of an object: {written_short(arguments)}", where)


def _no_number(name: str) -> None:
    raise ValueError(name)


def text_at(value: Any, where: str) -> str:
    """A text that is not empty. PromptError names the field at the end of `where`."""
    if not isinstance(value, str) or not value:
        raise PromptError(f"{where.rpartition('.')[2]} must be a text that is not empty: {written_short(value)}", where)
    return value


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **how: Any) -> list[int]:
    """Token ids of messages; `how`, and what is raised, are of `conversation_text`."""
    return tokenizer.encode(conversation_text(tokenizer, messages, **how), add_special_tokens=False)


def conversation_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    remedy: str,
    takes_records: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    arguments: Mapping[str, Any] | None = None,
    wishes: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> str:
    """The text of messages under the model's chat template, or under the one given.

    `remedy`: what the caller can do where no template serves. `arguments` must be read by the template; of `wishes`, it
    is given those that it reads. PromptError for what the template would leave out or refuses; OptionError for a
    `chat_template` that cannot be read.
    """
    template = tokenizer.chat_templates(chat_template).of(bool(tools), remedy)
    plain = plain_conversation(messages, takes_records)
    if continue_final_message:
        _check_final(plain, add_generation_prompt)
    template.check(plain, remedy)
    if tools and not template.shows_tools:
        raise PromptError("the model's chat template shows no tools: leave them out", "tools")
    arguments = as_template_arguments(arguments)
    template.check_arguments(arguments)
    for name, value in (wishes or {}).items():
        if value is not None and name in template.variables and arguments.setdefault(name, value) != value:
            raise PromptError(f"{name} contradicts chat_template_kwargs: give one", name)
    return template.reply_to(
        plain,
        [dict(tool) for tool in tools],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        arguments=arguments,
    )


def _check_final(plain: Sequence[Message], add_generation_prompt: bool) -> None:
    """PromptError where the last message cannot be continued."""
    if add_generation_prompt:
        said = "continue_final_message contradicts add_generation_prompt: set that to false"
        raise PromptError(said, "add_generation_prompt")
    if plain[-1].get("tool_calls") or not text_of(plain[-1]["content"]).strip():
        said = "continue_final_message needs a last message that has text and calls no tools"
        raise PromptError(said, f"messages.{len(plain) - 1}")
