"""Errors are in the words of whoever reads them: no Python types, no names of a library's."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import pytest

from outrider.errors import InputError, OptionError
from outrider.options import EngineOptions
from outrider.server.openai.record import parse
from outrider.server.openai.responses_schemas import ResponsesRequest
from outrider.server.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from outrider.server.options import ServerOptions

PYTHON = re.compile(r"Any\]|NoneType|<class|typing|Union\[|Optional\[|Literal|Input should|dictionary|_type\b|\bNone\b")
VALUES: list[Any] = [5, -1, 1.5, "x", True, [], [1], ["a", 2], {}, {"a": 1}, [{"a": 1}], [[]]]
NEEDED: dict[Any, dict[str, Any]] = {
    CompletionRequest: {"prompt": "x"},
    ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
    ResponsesRequest: {"input": "x"},
    TokenizeRequest: {},
    DetokenizeRequest: {"tokens": [1]},
}


def complaint(record: Any, body: dict[str, Any]) -> InputError | None:
    try:
        asked = parse(json.dumps(body).encode(), record)
        if hasattr(asked, "check"):
            asked.check()
            asked.sampling()
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("record", NEEDED, ids=lambda record: record.__name__)
def test_a_body_s_errors_name_the_field_in_json_s_words(record: Any) -> None:
    """Bug 17."""
    num_refused = 0
    for name in [*record.model_fields, *record.not_offered, "no_such_field"]:
        for value in VALUES:
            error = complaint(record, {**NEEDED[record], name: value})
            if error is not None:
                num_refused += 1
                assert error.field is not None and error.field.split(".")[0] == name, (name, value, error)
                assert not PYTHON.search(str(error)) and len(str(error)) > 10, (name, value, str(error))
    assert num_refused > 10


@pytest.mark.parametrize("record", [EngineOptions, ServerOptions])
def test_an_option_s_errors_are_in_plain_words(record: Any) -> None:
    """`speculative_config="ngram"` once had to be "Any] or None"."""
    num_refused = 0
    for entry in fields(record):
        for value in ({1}, 5.5, [[]], "x", 3):
            try:
                record(**{entry.name: value})
            except OptionError as error:
                num_refused += 1
                said = str(error).replace(" or None", "").replace("must be None", "")
                assert entry.name in said and not PYTHON.search(said), said
    assert num_refused > 20


def test_the_pattern_finds_what_is_wrong() -> None:
    for said in ("must be Any] or None", "must be a valid dictionary", "Input should be 1", "<class 'int'>"):
        assert PYTHON.search(said)
