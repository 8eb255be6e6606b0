"""A checkpoint's chat template: which one is taken, and in what form it shows each part of a conversation.

Nothing is taken on trust: the template is asked to write short conversations, and what it writes is read.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from outrider.core.reading import Fact, Reader, written_short
from outrider.errors import CheckpointError, OptionError, PromptError, nearest, shortened
from outrider.load.checkpoint import read_json

TEXT, PARTS = "text", "parts"
"""Forms of a message's content: a string, or a list of {"type": "text", "text": ...}."""

Message = dict[str, Any]

_SAID = "probed words"
_OTHER = "other words"
CALLED, _KEY, _VALUE = "outrider_probe", "probed_key", "probed_value"
"""The tool of the conversations that a template is asked to write, with its argument."""

_CALL_ID = "probe1234"
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": CALLED,
        "description": "x",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "x"}}},
    },
}
_PYTHON_OR_JSON_PART = re.compile(r"""['"]type['"]: ?['"]text['"]""")
"""A part that was written as a record, and not as its text."""

OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
)
"""What templates read that a request gives in fields of their own, or cannot give."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a template shows one kind of content, or why it does not."""

    kind: str | None
    reason: str = ""

    def __str__(self) -> str:
        if self.kind is not None:
            return f"as {self.kind}"
        return f"not shown{f': {self.reason}' if self.reason else ''}"


class ChatTemplate:
    """One template, as transformers runs it. What it shows is found at first use, by about ten renderings."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        """`tokenizer`: of transformers, whose special tokens the template may name."""
        self._tokenizer, self._source = tokenizer, source

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template makes of messages in the form that it shows. Raises whatever its code runs into."""
        written: str = self._tokenizer.apply_chat_template(
            list(messages),
            list(tools) or None,
            chat_template=self._source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(arguments or {}),
        )
        return written

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set: arguments that a request may give."""
        from jinja2 import meta
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            environment = _compile_jinja_template(self._source).environment
            names: set[str] = meta.find_undeclared_variables(environment.parse(self._source))
        except Exception:  # whatever a template that cannot be read runs into; `write` says what it is
            return frozenset()
        return frozenset(names - environment.globals.keys())

    def reply_to(self, messages: Sequence[Message], tools: Sequence[Message] = (), **how: Any) -> str:
        """The prompt that a conversation makes, as `write` takes it. PromptError where the template refuses it."""
        from jinja2 import TemplateError

        try:
            return self.write(self.shaped(messages), tools, **how)
        except Exception as error:  # whatever the code of a template runs into
            if type(error) is TemplateError:  # the template's own words
                raise PromptError(f"the chat template refused the messages: {error}") from error
            if how.get("continue_final_message") and isinstance(error, ValueError):
                said = (
                    "the chat template does not end with the last message's text, which therefore cannot be continued"
                )
                raise PromptError(f"{said}: leave continue_final_message out") from error
            raise PromptError(f"the chat template fails on these messages: {shortened(str(error))}") from error

    def _probed(self, messages: Sequence[Message], tools: Sequence[Message] = (), **how: Any) -> tuple[str, str]:
        """What it writes, and what it says where it refuses; one of them is empty."""
        from jinja2 import TemplateError

        try:
            return self.write(messages, tools, **how), ""
        except Exception as error:  # whatever the code of a template runs into
            refuses = type(error) is TemplateError  # the template's own words
            return "", str(error) if refuses else f"its code fails, {error}"

    def _form(self, before: Sequence[Message], message: Message, after: Sequence[Message] = ()) -> Form:
        """The form in which the message's text comes through; text rather than parts."""
        reason = ""
        for kind in (TEXT, PARTS):
            written, said = self._probed([*before, {**message, "content": in_form(_SAID, kind)}, *after])
            if _SAID in written and (kind == TEXT or not _PYTHON_OR_JSON_PART.search(written)):
                return Form(kind)
            reason = reason or said
        return Form(None, reason)

    def _said(self, role: str, text: str = _OTHER) -> Message:
        return {"role": role, "content": in_form(text, self.forms[role].kind)}

    @cached_property
    def _user_form(self) -> Form:
        return self._form((), {"role": "user"})

    @property
    def _user(self) -> Message:
        return {"role": "user", "content": in_form(_OTHER, self._user_form.kind)}

    @property
    def _call(self) -> Message:
        """An assistant's message that calls a tool, in the form that is shown."""
        return _call(TEXT if self.calls.kind == TEXT else "record")

    @cached_property
    def forms(self) -> dict[str, Form]:
        """How the text of each role is shown."""
        result = {"role": "tool", "tool_call_id": _CALL_ID, "name": CALLED}
        return {
            "user": self._user_form,
            "system": self._form((), {"role": "system"}, [self._user]),
            "assistant": self._form([self._user], {"role": "assistant"}, [self._user]),
            "tool": self._form([self._user, self._call], result),
        }

    @cached_property
    def calls(self) -> Form:
        """How the arguments of calls are shown: given as a record, or as the text of one."""
        reason, unclean = "", None
        for kind in ("record", TEXT):
            written, said = self._probed([self._user, _call(kind)])
            if CALLED in written and _VALUE in written:
                if f"{{'{_KEY}'" not in written and f'\\"{_KEY}' not in written:
                    return Form(kind)
                unclean = unclean or Form(kind)
            reason = reason or said
        return unclean or Form(None, reason)

    @cached_property
    def call_written(self) -> str:
        """What it writes of a call, from the end of the prompt that the call answers."""
        asked, _ = self._probed([self._user], add_generation_prompt=True)
        return self._probed([self._user, self._call])[0].removeprefix(asked)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the model is shown the tools of a request."""
        written, _ = self._probed([self._user], [_TOOL])
        return CALLED in written and _KEY in written

    @cached_property
    def shows_later_system(self) -> bool:
        """Whether a system's message that is not the first is shown, or refused by the template itself."""
        conversation = [self._said("system"), self._user, self._said("assistant"), self._said("system", _SAID)]
        written, refused = self._probed([*conversation, self._user])
        return bool(refused) or _SAID in written

    @cached_property
    def shows_history(self) -> bool:
        """Whether a user's earlier message is shown, or refused by the template itself."""
        written, refused = self._probed([self._said("user", _SAID), self._said("assistant"), self._user])
        return bool(refused) or _SAID in written

    @cached_property
    def begins_reply(self) -> bool:
        """Whether it writes the beginning of the reply where it is asked to."""
        return self._probed([self._user])[0] != self._probed([self._user], add_generation_prompt=True)[0]

    def check(self, messages: Sequence[Message], remedy: str) -> None:
        """PromptError for what of a conversation the template would leave out. `remedy`: what its caller can do."""
        last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
        for index, message in enumerate(messages):
            role, where = message["role"], f"messages.{index}"
            calls = bool(message.get("tool_calls"))
            form = self.calls if calls else self.forms[role]
            if form.kind is None and (calls or text_of(message["content"])):
                what = {"tool": "tool results", "assistant": "messages of the assistant"}.get(role, f"{role} messages")
                says = f" (it says: {shortened(form.reason)})" if form.reason else ""
                instead = {"system": "put the text into the first user message", "user": remedy}.get(
                    role, "leave it out"
                )
                what, field = ("tool calls", f"{where}.tool_calls") if calls else (what, where)
                raise PromptError(f"the model's chat template shows no {what}{says}: {instead}", field)
            if role == "system" and index and not self.shows_later_system:
                said = (
                    "the model's chat template shows a system message only where it is the first: put all in that one"
                )
                raise PromptError(said, where)
            if role == "user" and index < last_user and not self.shows_history:
                said = f"the model's chat template leaves out earlier turns of a conversation: {remedy}"
                raise PromptError(said, where)

    def check_arguments(self, given: Mapping[str, Any]) -> None:
        """PromptError for an argument that the template does not read, or that is not the caller's to set."""
        own = OWN_VARIABLES | inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        readable = self.variables - own
        for name in given:
            if name in own:
                said = f"chat_template_kwargs holds {name}, which is set otherwise: leave it out"
                raise PromptError(said, "chat_template_kwargs")
            if name not in readable:
                known = nearest(name, readable) if readable else "it reads none"
                said = f"the model's chat template reads no {shortened(name)} ({known}): leave it out"
                raise PromptError(said, "chat_template_kwargs")

    def shaped(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that the template shows: content as text or parts, arguments as it takes them."""
        shaped = []
        for message in messages:
            made = {**message, "content": in_form(message["content"], self.forms[message["role"]].kind)}
            if self.calls.kind == TEXT and message.get("tool_calls"):
                made["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
            shaped.append(made)
        return shaped

    def found(self) -> dict[str, str]:
        """What was found, for `explain`."""
        found = {f"{role} messages": str(form) for role, form in self.forms.items() if role != "tool"}
        later = "shown" if self.shows_later_system else "not shown"
        return {
            **found,
            **({} if self.forms["system"].kind is None else {"later system messages": later}),
            "tools": "shown" if self.shows_tools else "not shown",
            "tool calls": str(self.calls),
            "tool results": str(self.forms["tool"]),
            "beginning of the reply": "written" if self.begins_reply else "left to the model",
            "arguments": ", ".join(sorted(self.variables - OWN_VARIABLES)) or "none",
        }


def in_form(content: str | Sequence[str], kind: str | None) -> Any:
    """Content, a text or several, as a template is given it."""
    if kind == PARTS:
        return [{"type": "text", "text": text} for text in ([content] if isinstance(content, str) else content)]
    return text_of(content)


def text_of(content: str | Sequence[str]) -> str:
    """All text of some content."""
    return content if isinstance(content, str) else "".join(content)


def _call(kind: str) -> Message:
    arguments: Any = {_KEY: _VALUE}
    call = {"id": _CALL_ID, "type": "function", "function": {"name": CALLED, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [_with_text(call) if kind == TEXT else call]}


def _with_text(call: Message) -> Message:
    """A call with its arguments as the text of a record."""
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


JINJA_FILE = "chat_template.jinja"
_MORE = "additional_chat_templates"
_CONFIG = "tokenizer_config.json"


class ChatTemplates:
    """The templates of a checkpoint, or the one given instead of them. Where there are several, one is for tools."""

    def __init__(self, tokenizer: Any, directory: Path, given: str | None = None) -> None:
        """`given`: a template, the name of one of the checkpoint's, or the path of a file. OptionError for others.

        CheckpointError for a template of the checkpoint's that is no text.
        """
        self._tokenizer, self._directory, self._given = tokenizer, directory, given
        own: Any = tokenizer.chat_template
        self._own: dict[str, str] = own if isinstance(own, dict) else {} if own is None else {"default": own}
        for name, template in self._own.items():
            if not isinstance(template, str):
                raise CheckpointError(f"{_CONFIG}: chat_template {name} must be text: {written_short(template)}")
        self._origin = "the checkpoint's"
        if given is not None:
            self._own, self._origin = _named(given, self._own)
        self._made: dict[str, ChatTemplate] = {}

    def of(self, with_tools: bool, remedy: str) -> ChatTemplate:
        """The template of a request, as transformers chooses one. PromptError if there is none."""
        source = self._own.get("tool_use") if with_tools else None
        source = source or self._own.get("default")
        if source is None and self._own:
            names = ", ".join(sorted(self._own))
            raise PromptError(f"the model has several chat templates, {names}, and none is the default: {remedy}")
        if source is None:
            raise PromptError(f"the model has no chat template: {remedy}")
        if source not in self._made:
            self._made[source] = ChatTemplate(self._tokenizer, source)
        return self._made[source]

    def for_tools(self) -> ChatTemplate | None:
        """The template of requests with tools, if there is any."""
        try:
            return self.of(True, "")
        except PromptError:
            return None

    def _notes(self, said: Mapping[str, str]) -> Iterator[str]:
        """What a user should know of the templates."""
        if JINJA_FILE in said and _CONFIG in said and said[JINJA_FILE] != said[_CONFIG]:
            yield f"{JINJA_FILE} and {_CONFIG} hold different templates; the first is taken, as transformers does"
        if self._own and "default" not in self._own:
            yield f"none of the templates {', '.join(sorted(self._own))} is the default: chat is refused"
        if "default" in self._own:
            template = self.of(False, "")
            for role in ("user", "system"):
                form = template.forms[role]
                if form.kind is None:
                    yield f"{role} messages are {form}; requests that have one are refused"

    def fact(self) -> Fact:
        """Which template is taken, of what places, and what it shows."""
        said = {} if self._given is not None else templates_by_file(self._directory)
        taken = self._origin if self._given is not None else next(iter(said), None)
        shown: dict[str, Any] = {file: f"{len(template)} characters" for file, template in said.items()}
        for name in sorted(self._own) if len(self._own) > 1 else ():
            shown[f"template {name}"] = "for requests with tools" if name == "tool_use" else "taken where it is named"
        if "default" in self._own:
            shown |= self.of(False, "").found()
        return Fact("chat template", taken, shown, "; ".join(self._notes(said)) or None)


def _named(given: str, own: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The template that an option names, and what it is called."""
    if given in own:
        return {"default": own[given]}, f"the checkpoint's {given}"
    if "{{" in given or "{%" in given:
        return {"default": given}, "the one given"
    path = Path(given).expanduser()
    try:
        return {"default": path.read_text(encoding="utf-8")}, str(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        names = f", or one of {', '.join(sorted(own))}" if len(own) > 1 else ""
        why = getattr(error, "strerror", None) or "it is no text"
        said = f"cannot read chat_template {shortened(given)}: {why}; give a file, or a template itself{names}"
        raise OptionError(said) from None


def templates_by_file(directory: Path) -> dict[str, str]:
    """What each place of a checkpoint says of the template, the one that transformers takes first."""
    found: dict[str, str] = {}
    files = [path for path in (directory / JINJA_FILE, *sorted((directory / _MORE).glob("*.jinja"))) if path.is_file()]
    for path in files:
        try:
            found[str(path.relative_to(directory))] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
    if (directory / _CONFIG).is_file():
        held = Reader(read_json(directory / _CONFIG), _CONFIG).values.get("chat_template")
        if held is not None:
            found[_CONFIG] = held if isinstance(held, str) else json.dumps(held)
    return found
