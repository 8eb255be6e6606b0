"""The tools of a request: functions that the model is shown and may call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from outrider.core.reading import written_short
from outrider.errors import FieldError
from outrider.server.openai.hints import hint
from outrider.server.openai.record import Record


class Function(Record):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="what the model calls it by")
    description: str | None = Field(None, description="when to call it, for the model")
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = hint("nothing holds the model to the schema yet, so check the arguments of calls")


def _only_functions(given: Any) -> Any:
    """Tools of other types have other fields: it is the type that is wrong with them."""
    if isinstance(given, dict) and given.get("type") != "function":
        said = "must be a tool of type function, no other is offered: turn that tool off in the client"
        raise PydanticCustomError("tool_type", said)
    return given


AFunction = BeforeValidator(_only_functions)
"""For the annotation of a tool."""


class Tool(Record):
    """A function, as chat completions take it."""

    type: Literal["function"] = Field(description="function, as no other is offered")
    function: Function = Field(description="what may be called")


class FunctionTool(Function):
    """A function, as responses take it. Tools of OpenAI's own are not offered."""

    type: Literal["function"] = Field(description="function, as no other is offered")


ToolChoice = Annotated[Any, WithJsonSchema({"enum": ["none", "auto", None]})]


def shown_tools(functions: Sequence[Function], choice: Any, where: str) -> list[dict[str, Any]]:
    """Tools as a chat template takes them; none if the choice is to call none. FieldError for what cannot be promised.

    `where`: the path of a function in the request, with its number as `{}`.
    """
    if choice not in (None, "none", "auto"):
        said = "is not offered, as nothing makes the model call a tool: leave it out, or ask for auto or none"
        raise FieldError(f"tool_choice {written_short(choice)} {said}", "tool_choice")
    names: set[str] = set()
    for index, function in enumerate(functions):
        if function.name in names:
            raise FieldError(f"two tools have the name {function.name}: name them apart", f"{where.format(index)}name")
        names.add(function.name)
    if choice == "none":
        return []
    return [
        {
            "type": "function",
            "function": function.model_dump(include={"name", "description", "parameters"}, exclude_none=True),
        }
        for function in functions
    ]
