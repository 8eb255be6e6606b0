"""A request body as a record: each field is taken, or refused with its name and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from outrider.core.sampling import NOT_OFFERED as SAMPLING_NOT_OFFERED
from outrider.core.sampling_fields import NONE_OR_EMPTY
from outrider.errors import FieldError, nearest, shortened
from outrider.server.openai.hints import note_hints

MAX_NESTED = 64
"""Lists and objects of a body, each in the next."""

MAX_MEMBERS = 4096
"""Of each object of a body: what is wrong with it is listed before the first is reported."""

TOO_DEEP = f"the body is nested more than {MAX_NESTED} deep: flatten it"

NOTHING: tuple[Any, ...] = (None,)
_NEITHER = (None, False)

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    **SAMPLING_NOT_OFFERED,
    "add_special_tokens": (None,),
    "audio": NOTHING,
    "best_of": (None, 1),
    "cache_salt": NOTHING,
    "chat_template": NOTHING,
    "detokenize": (None, True),
    "documents": NONE_OR_EMPTY,
    "function_call": (None, "none"),
    "functions": NONE_OR_EMPTY,
    "include_reasoning": (None, True),
    "kv_transfer_params": NONE_OR_EMPTY,
    "length_penalty": (None, 1),
    "mm_processor_kwargs": NONE_OR_EMPTY,
    "modalities": (None, ["text"]),
    "moderation": NOTHING,
    "prediction": NOTHING,
    "priority": (None, 0),
    "prompt_embeds": NOTHING,
    "response_format": (None, {"type": "text"}),
    "return_tokens_as_token_ids": _NEITHER,
    "spaces_between_special_tokens": (None, True),
    "store": _NEITHER,
    "suffix": NONE_OR_EMPTY,
    "top_logprobs": (None, 0),
    "truncate_prompt_tokens": NOTHING,
    "use_beam_search": _NEITHER,
    "verbosity": (None, "medium"),
    "web_search_options": NOTHING,
}
"""Fields of OpenAI's and vLLM's that ask for what the engine lacks, and the values that ask for nothing."""


class _FirstFault(FailFast):
    """pydantic's, as part of an optional field's type, which must be hashable."""

    __hash__ = object.__hash__


FIRST_FAULT = _FirstFault()
"""For the annotation of a list: the first wrong item is reported, and no list of all is made."""


class Record(BaseModel):
    """A request body, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True)
    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_OFFERED


Asked = TypeVar("Asked", bound=Record)


def parse(body: bytes, record: type[Asked]) -> Asked:
    """A request body as its record. FieldError for the first thing that is wrong with it."""
    try:
        given = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise FieldError(f"the body is not JSON: no UTF-8 from byte {error.start} on, send it as UTF-8") from None
    except RecursionError:
        raise FieldError(TOO_DEEP) from None
    except msgspec.DecodeError as error:
        raise FieldError(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise FieldError("the body must be a JSON object")
    _check_shape(given)
    known = record.model_fields
    for name in list(given):
        if name in known:
            continue
        if name not in record.not_offered:
            raise FieldError(f"unknown field: {shortened(name)} ({nearest(name, known)})", shortened(name))
        if not _asks_for_nothing(given.pop(name), record.not_offered[name]):
            raise FieldError(f"{name} is not offered: leave it out", name)
    try:
        asked = record.model_validate(given)
    except ValidationError as error:
        raise _field_error(error) from None
    note_hints(asked)
    return asked


def _check_shape(given: Any) -> None:
    """Raises FieldError for what is nested so deeply that encoding it could fail, and for objects of huge size."""
    level = [given]
    for _ in range(MAX_NESTED):
        largest = max((len(each) for each in level if isinstance(each, dict)), default=0)
        if largest > MAX_MEMBERS:
            raise FieldError(f"an object of the body has {largest} members: give at most {MAX_MEMBERS}")
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise FieldError(TOO_DEEP)


def _asks_for_nothing(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them; 1 is not True here, but 0.0 is 0."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 64 bits",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "model_type": "must be an object",
}
"""pydantic's kinds of complaint, in JSON's terms."""


def _field_error(error: ValidationError) -> FieldError:
    """The first of pydantic's complaints, in our words."""
    first = error.errors(include_url=False)[0]
    name = shortened(".".join(str(part) for part in first["loc"]))
    if first["type"] == "missing":
        return FieldError(f"{name} is missing", name)
    if first["type"] == "extra_forbidden":
        return FieldError(f"unknown field: {name}: leave it out", name)
    said = _WORDS.get(first["type"]) or first["msg"].replace("Input should be", "must be")
    return FieldError(f"{name} {said}: {as_json(first['input'])}", name)


def as_json(value: Any) -> str:
    """A value as the client wrote it, for a message."""
    try:
        return shortened(msgspec.json.encode(value).decode())
    except (msgspec.EncodeError, TypeError, RecursionError, ValueError):
        return "a value that JSON does not have"
