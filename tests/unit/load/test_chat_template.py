"""Chat templates: what each shows is found by asking it, and what it would leave out is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import HERMES_TEMPLATE, LLAMA_TEMPLATE, fake_server, write_tokenizer
from outrider.engine.conversation import encode_conversation, plain_conversation
from outrider.errors import CheckpointError, OptionError, PromptError
from outrider.load.chat_template import ChatTemplate
from outrider.load.tokenizer import Tokenizer

USER: list[Any] = [{"role": "user", "content": "Hi"}]
CALL = {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "Zürich"}'}}
CALLED = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
ANSWERED = [*CALLED, {"role": "tool", "tool_call_id": "a", "content": "noon"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

ROLES = "{% for m in messages %}<{{ m.role }}>"
PARTS = ROLES + "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
TYPED_PARTS = (
    ROLES + "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
BOTH = (
    ROLES + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
PLAIN = ROLES + "{{ m.content }}{% endfor %}"
SYSTEM_AS_TEXT = (
    ROLES + "{% if m.role == 'system' %}{{ m.content + '!' }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
LAST_ONLY = "<{{ messages[-1].role }}>{{ messages[-1].content }}"
NOTHING = "<user>"
IMAGES = ROLES + "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}{% endfor %}"
DUMPS_PARTS = ROLES + "{% if m.content is not string %}{{ m.content }}{% endif %}{% endfor %}"
CALLS_AS_TEXT = (
    ROLES + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '[' + c.function.name + ' ' + c.function.arguments + ']' }}{% endfor %}{% endfor %}"
)
CALLS_AS_ITEMS = (
    ROLES + "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}]{% endfor %}{% endfor %}"
)
CALLS_PRINTED = (
    ROLES
    + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    + "[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}{% endfor %}"
)
RESULT_NAMES = ROLES + "{{ m.name }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}{% endfor %}"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Tokenizer]:
    """A tokenizer of bytes with a chat template."""

    def make(template: Any, **files: str) -> Tokenizer:
        path = write_tokenizer(tmp_path, template)
        for name, text in files.items():
            (path / name.replace("_jinja", ".jinja")).write_text(text)
        return Tokenizer(path)

    return make


def written(tokenizer: Tokenizer, messages: list[Any], **how: Any) -> str:
    ids = encode_conversation(tokenizer, messages, remedy="do so", **how)
    return tokenizer.decode(ids, skip_special_tokens=False)


def refused(tokenizer: Tokenizer, messages: list[Any], **how: Any) -> PromptError:
    with pytest.raises(PromptError) as error:
        written(tokenizer, messages, **how)
    return error.value


SYSTEM = [{"role": "system", "content": "Terse."}, *USER]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "<system>Terse.<user>Hi"),
        (PARTS, "<system>Terse.<user>Hi"),
        (TYPED_PARTS, "<system>Terse.<user>Hi"),
        (BOTH, "<system>Terse.<user>Hi"),
        (SYSTEM_AS_TEXT, "<system>Terse.!<user>Hi"),
        (FIRST_SYSTEM, "<system>Terse.<user>Hi"),
    ],
)
def test_the_form_that_comes_through_is_used(load: Any, template: str, expected: str) -> None:
    """Bug 5: a template that iterates content parts was given text, and showed nothing."""
    tokenizer = load(template)
    assert written(tokenizer, SYSTEM) == expected
    in_parts = [{**one, "content": [{"type": "text", "text": text} for text in one["content"]]} for one in SYSTEM]
    assert written(tokenizer, in_parts) == expected, "and parts are joined where text is shown"


def test_text_alone_would_be_lost(load: Any) -> None:
    """The negative control: what the template makes of the form that it does not show."""
    template = ChatTemplate(load(PARTS).wrapped, PARTS)
    assert template.write(USER) == "<user>" and template.write(template.shaped(USER)) == "<user>Hi"


@pytest.mark.parametrize(
    ("template", "messages", "field", "said"),
    [
        (NO_SYSTEM, SYSTEM, "messages.0", "shows no system messages: put the text into the first user message"),
        (REFUSES_SYSTEM, SYSTEM, "messages.0", r"\(it says: System role not supported\): put the text"),
        (FIRST_SYSTEM, [*USER, SYSTEM[0], *USER], "messages.1", "only where it is the first"),
        (NOTHING, USER, "messages.0", "shows no user messages: do so"),
        (IMAGES, USER, "messages.0", "shows no user messages: do so"),
        (DUMPS_PARTS, USER, "messages.0", "shows no user messages: do so"),
        (LAST_ONLY, [*USER, {"role": "assistant", "content": "Yes"}, *USER], "messages.0", "leaves out earlier turns"),
        (
            NO_SYSTEM.replace("system", "assistant"),
            [*USER, {"role": "assistant", "content": "x"}, *USER],
            "messages.1",
            "no messages of the assistant",
        ),
        (PLAIN, CALLED, "messages.1.tool_calls", "shows no tool calls"),
        (ALTERNATING, [*USER, *USER], None, "refused the messages: roles must alternate"),
        (PLAIN.replace("m.content", "m.content + m.nothing.of"), USER, "messages.0", "its code fails"),
        ("{% for m in messages %}{{ m.content }", USER, "messages.0", "its code fails"),
        (None, USER, None, "the model has no chat template: do so"),
        (
            {"rag": PLAIN, "tool_use": PLAIN},
            USER,
            None,
            "several chat templates, rag, tool_use, and none is the default: do so",
        ),
    ],
)
def test_what_is_left_out_is_refused(load: Any, template: Any, messages: Any, field: str, said: str) -> None:
    error = refused(load(template), messages)
    assert error.field == field and re.search(said, str(error)), error


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (CALLS_AS_TEXT, '[get_time {"zone": "Zürich"}]'),
        (CALLS_AS_ITEMS, "[get_time zone=Zürich]"),
        (CALLS_PRINTED, '[get_time {"zone": "Zürich"}]'),
        (HERMES_TEMPLATE, '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Zürich"}}\n</tool_call>'),
        (LLAMA_TEMPLATE, '{"name": "get_time", "parameters": {"zone": "Zürich"}}'),
    ],
)
def test_arguments_of_calls_are_a_record_or_its_text(load: Any, template: str, call: str) -> None:
    assert call in written(load(template), ANSWERED)


def test_results_have_the_name_of_their_function(load: Any) -> None:
    """OpenAI's clients leave it out, and some templates show it."""
    assert written(load(RESULT_NAMES), ANSWERED).endswith("<tool>get_time:noon")
    older = [*USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]
    result = {"role": "function", "name": "get_time", "content": "noon"}
    assert written(load(RESULT_NAMES), [*older, result]).endswith("<tool>get_time:noon")
    assert refused(load(RESULT_NAMES), [*older, {**result, "name": "other"}]).field == "messages.2.name"


def test_several_templates(load: Any) -> None:
    """As transformers has it: `tool_use` for requests with tools, else `default`."""
    tokenizer = load({"default": "plain" + PLAIN, "tool_use": "tools{{ tools | tojson }}" + PARTS})
    assert written(tokenizer, USER) == "plain<user>Hi"
    assert written(tokenizer, USER, tools=[TOOL]).endswith("<user>Hi")
    assert "tool_use" in str(tokenizer.chat_templates().fact())
    assert written(tokenizer, USER, chat_template="tool_use").startswith("toolsnull<user>")


def test_two_places(load: Any, tmp_path: Path) -> None:
    """chat_template.jinja wins over tokenizer_config.json, and that is said where they differ."""
    tokenizer = load(PLAIN)
    fact = tokenizer.chat_templates().fact()
    assert fact.taken == "chat_template.jinja" and fact.note is None and fact.said["user messages"] == "as text"
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "old" + PLAIN}))
    both = Tokenizer(tmp_path)
    assert written(both, USER) == "<user>Hi"
    assert "the first is taken, as transformers does" in (both.chat_templates().fact().note or "")
    (tmp_path / "chat_template.jinja").unlink()
    old = Tokenizer(tmp_path)
    assert written(old, USER) == "old<user>Hi" and old.chat_templates().fact().taken == "tokenizer_config.json"


def test_a_template_that_is_no_text(load: Any, tmp_path: Path) -> None:
    load(None)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": 5}))
    with pytest.raises(CheckpointError, match="chat_template default must be text: 5"):
        written(Tokenizer(tmp_path), USER)


def test_a_server_s_template(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, NOTHING)
    (tmp_path / "mine.jinja").write_text(PARTS)
    with fake_server(path, None, None, str(tmp_path / "mine.jinja")) as (url, engine):
        engine.says = ["Yes."]
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": USER})
        assert answer.status_code == 200 and engine.prompts[-1] == "<user>Hi"
    with fake_server(path) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": USER})
    assert answer.status_code == 400 and "--chat-template FILE" in answer.json()["error"]["message"]


def test_what_was_found_is_a_fact(load: Any) -> None:
    fact = load(NO_SYSTEM).chat_templates().fact()
    assert fact.note == "system messages are not shown; requests that have one are refused"
    assert fact.said["tool calls"] == "not shown" == fact.said["tools"]
    assert load(HERMES_TEMPLATE).chat_templates().fact().note is None


def test_a_template_given(load: Any, tmp_path: Path) -> None:
    tokenizer = load(None)
    (tmp_path / "mine.jinja").write_text(PARTS)
    for given in (PARTS, str(tmp_path / "mine.jinja")):
        assert written(tokenizer, USER, chat_template=given) == "<user>Hi"
        assert tokenizer.chat_templates(given).fact().taken
    with pytest.raises(OptionError, match="cannot read chat_template nowhere: No such file"):
        written(tokenizer, USER, chat_template="nowhere")


def test_arguments_that_the_template_does_not_read(load: Any) -> None:
    tokenizer = load("{%- set short = short | default(false) %}{{ bos_token }}{{ mood if mood is defined }}" + PLAIN)
    assert written(tokenizer, USER, arguments={"mood": "glad"}) == "glad<user>Hi"
    error = refused(tokenizer, USER, arguments={"moood": "glad"})
    assert "reads no moood (did you mean mood?)" in str(error) and error.field == "chat_template_kwargs"
    assert "reads no enable_thinking (known: mood, short)" in str(
        refused(tokenizer, USER, arguments={"enable_thinking": False})
    )
    for name in ("tools", "messages", "chat_template", "tokenize", "add_generation_prompt", "self", "m", "bos_token"):
        assert refused(tokenizer, USER, arguments={name: 1}).field == "chat_template_kwargs"


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        PARTS,
        ROLES + "{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    ],
)
def test_continuing_the_final_message(load: Any, template: str) -> None:
    tokenizer = load(template)
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    how = {"add_generation_prompt": False, "continue_final_message": True}
    assert written(tokenizer, messages, **how).endswith("<assistant>It is")
    assert refused(tokenizer, messages, continue_final_message=True).field == "add_generation_prompt"
    for last in ({"role": "assistant", "content": " "}, CALLED[-1]):
        error = refused(tokenizer, [*USER, last], **how)
        assert error.field == "messages.1"
    cutting = load(ROLES + "{{ m.content[:20] }}{% endfor %}")
    assert "cannot be continued" in str(
        refused(cutting, [*USER, {"role": "assistant", "content": "It is so, and has long been so"}], **how)
    )


def test_a_reply_that_is_not_begun(load: Any) -> None:
    tokenizer = load(HERMES_TEMPLATE)
    assert written(tokenizer, USER).endswith("<|user|>Hi<|assistant|>")
    assert written(tokenizer, USER, add_generation_prompt=False).endswith("<|user|>Hi")
    assert tokenizer.chat_templates().fact().said["beginning of the reply"] == "written"
    assert load(PLAIN).chat_templates().fact().said["beginning of the reply"] == "left to the model"


@pytest.mark.parametrize("content", [None, "", []])
def test_a_refusal_is_the_answer_where_there_is_no_other(content: Any) -> None:
    answer = {"role": "assistant", "content": content, "refusal": "I cannot."}
    assert plain_conversation([{"role": "user", "content": "Hi"}, answer])[1]["content"] == "I cannot."
