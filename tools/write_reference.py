"""Writes the pages of docs/reference from the code: options, request fields, metrics and JSON shapes.

    PYTHONPATH=src python tools/write_reference.py            # rewrites the pages
    PYTHONPATH=src python tools/write_reference.py --check    # exit code 1 if one would change

Metrics and JSON shapes are those of a server that the script starts and asks.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import operator
import re
import sys
import tempfile
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import httpx
import typer
from pydantic import BaseModel

import outrider
from outrider.cli.common import Drafting
from outrider.cli.main import app
from outrider.cli.support import support, to_markdown
from outrider.core.sampling import SamplingParams
from outrider.draft.registry import METHODS
from outrider.engine.outputs import CompletionOutput, RequestOutput
from outrider.options import EngineOptions
from outrider.runner.registry import RUNNERS
from outrider.server.openai.responses_schemas import ResponsesRequest
from outrider.server.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from outrider.server.options import ServerOptions
from outrider.train.options import TrainOptions

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
NOTE = "`tools/write_reference.py` writes this page from the code, and a test compares the two.\n"
SIGNATURE_WIDTH = 80
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
PROMPT = "import os\n"
ASKED: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Add two numbers."}],
        "max_tokens": 8,
        "temperature": 0,
    },
    "/v1/responses": {"input": "Add two numbers.", "max_output_tokens": 16, "temperature": 0},
    "/tokenize": {"prompt": PROMPT},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""The requests whose answers the page of JSON shapes shows."""


def one_line(text: str) -> str:
    """Text that a cell of a table can hold."""
    return " ".join(text.split()).replace("|", "\\|")


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in markdown."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


# Options.


def type_name(hint: Any) -> str:
    """A type as a reader writes it."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if typing.get_origin(hint) in (list, tuple) or getattr(typing.get_origin(hint), "__name__", "") == "Sequence":
        return f"list of {type_name(members[0])}"
    if getattr(typing.get_origin(hint) or hint, "__name__", "") == "Mapping":
        return "record"
    if members:
        return " or ".join(dict.fromkeys(type_name(member) for member in members))
    return {str: "text", int: "int", float: "float", bool: "bool"}.get(hint, getattr(hint, "__name__", str(hint)))


def options_table(record: type[Any], but: frozenset[str] = frozenset()) -> str:
    """The fields of an options record: name, type, default and help."""
    hints = typing.get_type_hints(record)
    rows = []
    for entry in fields(record):
        if entry.name in but or entry.metadata.get("derived"):
            continue
        default = "required" if entry.default is MISSING else f"`{json.dumps(entry.default)}`"
        rows.append((f"`{entry.name}`", type_name(hints[entry.name]), default, one_line(entry.metadata["help"])))
    return table(("option", "type", "default", "meaning"), rows)


def flags_table(commands: Mapping[str, Any]) -> str:
    """The flags that belong to a command alone, and to no record of options."""
    records = (EngineOptions, Drafting, SamplingParams, ServerOptions, TrainOptions)
    of_records = {entry.name for record in records for entry in fields(record)} | {"help", "as_json"}
    # of a file of the package only the name: its directory differs from one checkout to the next
    name_of = operator.attrgetter("name")
    rows = [
        (
            f"`outrider {name}`",
            f"`{flag.opts[0]}`",
            f"`{json.dumps(flag.default, default=name_of)}`",
            one_line(flag.help),
        )
        for name, each in commands.items()
        for flag in each.params
        if flag.name not in of_records and flag.param_type_name == "option"
    ]
    return table(("command", "flag", "default", "meaning"), rows)


def options_page() -> str:
    """Every options record, and the commands that take it."""
    group: Any = typer.main.get_command(app)
    found = {**group.commands, **{f"bench {name}": each for name, each in group.commands["bench"].commands.items()}}
    del found["bench"]
    commands = [(f"`outrider {name}`", one_line((each.help or "").split("\n\n")[0])) for name, each in found.items()]
    shared = frozenset(entry.name for entry in fields(next(iter(METHODS.values())).Options))
    methods = "".join(
        f"### Method `{name}`\n\n{options_table(drafter.Options)}\n"
        for name, drafter in METHODS.items()
        if any(not entry.metadata.get("derived") for entry in fields(drafter.Options))
    )
    assert shared, "a method has the common options"
    return (
        f"# Options\n\n{NOTE}\nAn option is a keyword argument of `LLM`. On the command line `max_num_seqs` is "
        "`--max-num-seqs`.\nA default of `null` means that the engine decides; the meaning says how.\n\n"
        f"## Commands\n\n{table(('command', 'does'), commands)}\n"
        "Every command takes `--json`; `outrider serve --json` prints where it listens. A command that loads an engine "
        f"takes these flags for drafting, with `-k` for K:\n\n{options_table(Drafting)}\n"
        "`serve`, `generate`, `accept` and `explain` draft unasked: the bundled model with its P-EAGLE head, others by "
        "n-gram lookup.\n`LLM` and `outrider bench` draft only if asked.\n\n"
        f"Flags of one command:\n\n{flags_table(found)}\n"
        f"## Engine\n\nTaken by `LLM` and by every command that loads an engine.\n\n{options_table(EngineOptions)}\n"
        "## Drafting\n\nThe keys of `speculative_config`, by `method`. "
        f"[Drafting](../guide/drafting.md) explains the methods.\n\n{methods}"
        f"## Sampling\n\nThe fields of `SamplingParams`.\n\n{options_table(SamplingParams)}\n"
        f"## Server\n\nTaken by `outrider serve`.\n\n{options_table(ServerOptions)}\n"
        f"## Training\n\nTaken by `outrider train`.\n\n{options_table(TrainOptions)}"
    )


# The Python API.


def docstring(thing: Any) -> str:
    """A docstring as paragraphs of markdown."""
    return inspect.getdoc(thing) or ""


def signature(name: str, function: Any) -> str:
    """A function as a reader calls it, one parameter a line if it is long."""
    given = inspect.signature(function)
    shown = [one for one in given.parameters.values() if one.name not in ("self", "cls")]
    text = f"{name}{given.replace(parameters=shown)}"
    if len(text) <= SIGNATURE_WIDTH:
        return without_quotes(text)
    marks: list[str] = []
    for one in shown:
        if one.kind is one.KEYWORD_ONLY and not any(mark.startswith("*") for mark in marks):
            marks.append("*")
        marks.append(str(one))
    returned = "" if given.return_annotation is given.empty else f" -> {given.return_annotation}"
    return without_quotes("".join([f"{name}(\n", *(f"    {mark},\n" for mark in marks), f"){returned}"]))


def without_quotes(text: str) -> str:
    """A signature whose annotations are not quoted, as they are where they are read late."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def class_section(thing: type[Any]) -> str:
    """A class: what it is, its fields, and its public methods and properties."""
    text = f"## {thing.__name__}\n\n{docstring(thing)}\n\n"
    if is_dataclass(thing):
        source = inspect.getsource(thing)
        rows = []
        for entry in fields(thing):
            said = re.search(rf"^    {entry.name}: .*?  # (.*)$", source, re.MULTILINE)
            rows.append((f"`{entry.name}`", f"`{one_line(str(entry.type))}`", one_line(said[1]) if said else ""))
        text += table(("field", "type", "meaning"), rows) + "\n"
    members = {name: member for name, member in vars(thing).items() if not name.startswith("_")}
    if not is_dataclass(thing):
        members = {"__init__": thing.__init__, **members}  # type: ignore[misc]
    for name, member in members.items():
        if isinstance(member, property):
            text += f"### {thing.__name__}.{name}\n\n{docstring(member)}\n\n"
        elif inspect.isfunction(function := getattr(member, "__func__", member)):
            called = thing.__name__ if name == "__init__" else name
            heading = thing.__name__ + ("()" if name == "__init__" else f".{name}")
            text += f"### {heading}\n\n```\n{signature(called, function)}\n```\n\n{docstring(function)}\n\n"
    return text


def error_lines(error: type[BaseException], depth: int = 0) -> Iterator[str]:
    """The tree of errors, one a line."""
    yield f"{'  ' * depth}- `{error.__name__}`: {one_line(docstring(error).split(chr(10) * 2)[0])}\n"
    for inner in error.__subclasses__():
        if inner.__name__ in outrider.__all__:
            yield from error_lines(inner, depth + 1)


def python_page() -> str:
    """The classes that a caller of `LLM` meets, and the errors."""
    met = (outrider.LLM, RequestOutput, CompletionOutput, outrider.Piece, outrider.AcceptanceReport)
    text = (
        f"# Python API\n\n{NOTE}\n`from outrider import LLM, SamplingParams` is where to start. The options of `LLM` "
        "and the fields of `SamplingParams` are in [Options](options.md). [Extending](../guide/extending.md) has the "
        "classes for your own drafters, logits processors and models.\n\n"
    )
    text += "".join(class_section(thing) for thing in met)
    return text + "## Errors\n\n" + "".join(error_lines(outrider.OutriderError))


# Request fields.


def schema_name(schema: Mapping[str, Any]) -> str:
    """The type of a JSON schema, in a few words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(schema_name(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"] if value is not None)
    if "$ref" in schema:
        return "record"
    if schema.get("type") == "array":
        return f"list of {schema_name(schema.get('items', {}))}"
    return {"string": "text", "integer": "int", "number": "float", "boolean": "bool", "object": "record"}.get(
        schema.get("type", ""), "any"
    )


def bounds(schema: Mapping[str, Any]) -> str:
    """The range of a number."""
    found = {**schema, **next((one for one in schema.get("anyOf", ()) if one.get("type") in ("integer", "number")), {})}
    signs = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "to"}
    return ", ".join(f"{sign} {found[name]:,}" for name, sign in signs.items() if name in found)


def described(record: type[BaseModel], name: str) -> str:
    """What a field means: its own description, or that of the sampling parameter of this name, or of its record."""
    schema = record.model_json_schema()
    own = schema["properties"][name]
    helps = {entry.name: entry.metadata.get("help", "") for entry in fields(SamplingParams)}
    for one in (own, *own.get("anyOf", ()), *own.get("allOf", ())):
        if "$ref" in one and "description" not in own:
            return one_line(schema["$defs"][one["$ref"].rpartition("/")[2]].get("description", "").split("\n\n")[0])
    return one_line(own.get("description") or helps.get(name, ""))


def fields_table(record: type[BaseModel]) -> str:
    """The fields of a request body."""
    properties = record.model_json_schema()["properties"]
    rows = [
        (f"`{name}`", schema_name(schema), bounds(schema), described(record, name))
        for name, schema in properties.items()
    ]
    return table(("field", "type", "range", "meaning"), rows)


def nested(records: Mapping[str, type[BaseModel]]) -> dict[str, dict[str, Any]]:
    """The records inside bodies, by name."""
    found: dict[str, dict[str, Any]] = {}
    for record in records.values():
        found |= record.model_json_schema().get("$defs", {})
    return found


def fields_page() -> str:
    """Every request body: what is taken, and what may only be given as if it were left out."""
    text = (
        f"# Request fields\n\n{NOTE}\nA field that is not listed here is refused with status 400. `param` of the error "
        "names it.\n\n"
    )
    for path, record in BODIES.items():
        text += f"## {path}\n\n{fields_table(record)}\n"
    for name, schema in sorted(nested(BODIES).items()):
        rows = [
            (f"`{field}`", schema_name(own), bounds(own), one_line(own.get("description", "")))
            for field, own in schema["properties"].items()
        ]
        text += f"## {name}\n\n{one_line(schema.get('description', ''))}\n\n"
        text += f"{table(('field', 'type', 'range', 'meaning'), rows)}\n"
    text += (
        "## Not offered\n\nThe engine lacks what these fields ask for. A request may give them with a value that asks "
        "for nothing.\n\n"
    )
    for paths, record in (("Completions and chat", CompletionRequest), ("`/v1/responses`", ResponsesRequest)):
        rows = [
            (f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in values))
            for name, values in sorted(record.not_offered.items())
        ]
        text += f"### {paths}\n\n{table(('field', 'values taken'), rows)}\n"
    return text.rstrip("\n") + "\n"


# Metrics and JSON shapes, as a server gives them.


def metrics_page(exposed: str) -> str:
    """The metrics of a page of Prometheus."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposed, re.MULTILINE))
    rows = []
    for name, meaning in re.findall(r"^# HELP (\S+) (.*)$", exposed, re.MULTILINE):
        if name.endswith("_created"):
            continue
        sample = re.search(rf"^{re.escape(name)}(?:_bucket)?{{(.*?)}} ", exposed, re.MULTILINE)
        labels = re.findall(r"(\w+)=\"", sample[1]) if sample else []
        shown = ", ".join(f"`{label}`" for label in labels if label not in ("model_name", "le"))
        rows.append((f"`{name}`", kinds[name], shown, one_line(meaning)))
    return (
        f"# Metrics\n\n{NOTE}\n`/metrics` answers in the format of Prometheus. Names are vLLM's where the meaning is "
        "the same, with the prefix `outrider:`. Every metric has the label `model_name`.\n\n"
        f"{table(('metric', 'type', 'other labels', 'meaning'), sorted(rows))}"
    )


def shape(value: Any) -> Any:
    """A value with the name of its type in place of every leaf; of a list, the first item."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    names = {str: "text", bool: "bool", int: "int", float: "float", type(None): None}
    return names[type(value)]


def run(*arguments: str) -> Any:
    """What a command prints with `--json`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        typer.main.get_command(app).main([*arguments, "--json"], standalone_mode=False)
    return json.loads(printed.getvalue())


def samples(url: str) -> Iterator[tuple[str, str, Any]]:
    """Heading, one sentence and an example of every JSON that outrider prints or answers."""
    with httpx.Client(base_url=url, timeout=60.0) as client:
        for path, body in ASKED.items():
            yield f"Answer of {path}", "", client.post(path, json=body).json()
        for path in ("/v1/completions", "/v1/chat/completions"):
            wanted = {**ASKED[path], "stream": True, "speculative": {"return_tokens": True}}
            lines = client.post(path, json=wanted).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            text = "One chunk of a stream, with `speculative.return_tokens`."
            yield f"Stream of {path}", text, next(one for one in events if "speculative" in one["choices"][0])
        for path in ("/v1/models", "/playground/state"):
            yield f"Answer of {path}", "", client.get(path).json()
        refused = client.post("/v1/completions", json={"prompt": PROMPT, "top_p": 2}).json()
        yield "Error over HTTP", "The answer to every request that is refused.", refused
    yield "outrider explain --json", "", run("explain", "--draft", "eagle3")
    words = ("generate", "--prompt", PROMPT, "--max-tokens", "8", "--draft", "peagle", "--compare")
    yield "outrider generate --json", "With `--compare`.", run(*words)
    yield "outrider accept --json", "", run("accept", "--num-prompts", "1", "--max-tokens", "8", "--draft", "peagle")


def json_page(url: str) -> str:
    """The shape of every answer."""
    text = (
        f"# JSON shapes\n\n{NOTE}\nEach block shows the type of a value in its place. Of a list it shows one item.\n\n"
    )
    for heading, sentence, value in samples(url):
        text += f"## {heading}\n\n" + (f"{sentence}\n\n" if sentence else "")
        text += f"```json\n{json.dumps(shape(value), indent=2)}\n```\n\n"
    return text.rstrip("\n") + "\n"


def pages_of_code() -> dict[str, str]:
    """The pages that need no server, by file name."""
    return {
        "support.md": to_markdown(support(RUNNERS)),
        "options.md": options_page(),
        "python.md": python_page(),
        "request_fields.md": fields_page(),
    }


def pages_of_server(url: str) -> dict[str, str]:
    """The pages that a server with nothing but this script for a client gives."""
    shapes = json_page(url)
    return {"json.md": shapes, "metrics.md": metrics_page(httpx.get(f"{url}/metrics").text)}


def main() -> None:
    """Writes or compares all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page would change")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from servers import serving

    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "log") as server:
        pages = {**pages_of_code(), **pages_of_server(server.url)}
    changed = [name for name, text in pages.items() if (PAGES / name).read_text() != text]
    for name in changed:
        print(f"{'out of date' if asked.check else 'written'}: docs/reference/{name}")
        if not asked.check:
            (PAGES / name).write_text(pages[name])
    sys.exit(bool(asked.check and changed))


if __name__ == "__main__":
    main()
