"""Builds the chat-formatted share of the corpus: code edits, functions written from their docstring, summaries.

    python instructions.py --work DIR       reads DIR/train.jsonl, writes DIR/chat.jsonl

Every answer is made from real source by a text edit at positions that `ast` gives, so it is valid Python.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import keyword
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from corpus import stable_hash

CHAT_SHARE = 0.10
REPEAT_SHARE = 0.01
NAME_WORDS = """
items values data result entry node index total count config options settings payload record source target
path name label key value buffer chunk line text message token user client session handler callback context
state params args_list mapping lookup table row column matrix vector weight score limit size length offset
start stop step current previous first last left right parent child owner group batch sample field attribute
element number amount price width height depth level mode kind status flag timeout retries delay interval
duration
"""
NEW_NAMES = NAME_WORDS.split()
NEW_PARAMETERS = [
    ("verbose", "False"), ("timeout", "None"), ("strict", "True"), ("limit", "10"), ("debug", "False"),
    ("encoding", '"utf-8"'), ("default", "None"), ("dry_run", "False"), ("max_retries", "3"), ("logger", "None"),
]  # fmt: skip
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Turn(NamedTuple):
    """One request and its answer; `code` is what the request is about, empty where it shows none."""

    request: str
    code: str
    answer: str


class Snippet(NamedTuple):
    """A dedented function or class and its parse tree."""

    code: str
    node: FunctionNode | ast.ClassDef


class Span(NamedTuple):
    """Replace the characters [start, end) by `text`."""

    start: int
    end: int
    text: str


def snippets(text: str) -> Iterator[Snippet]:
    """Yields the functions, methods and classes of a file that are of a size to show in a chat."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FunctionNode | ast.ClassDef) and node.end_lineno is not None:
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            code = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            if 150 <= len(code) <= 2600 and "```" not in code and code.isascii():
                try:
                    parsed = ast.parse(code).body[0]
                except SyntaxError:
                    continue
                if isinstance(parsed, FunctionNode | ast.ClassDef):
                    yield Snippet(code, parsed)


def offset(code: str, line: int, column: int) -> int:
    """The character index of an ast position in ASCII text."""
    return sum(len(row) + 1 for row in code.split("\n")[: line - 1]) + column


def span_of(code: str, node: ast.expr | ast.stmt | ast.arg, text: str) -> Span:
    """The span that replaces `node` by `text`."""
    end = offset(code, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
    return Span(offset(code, node.lineno, node.col_offset), end, text)


def apply(code: str, spans: list[Span]) -> str:
    """Applies replacements that do not overlap."""
    for span in sorted(spans, reverse=True):
        code = code[: span.start] + span.text + code[span.end :]
    return code


def rename_variable(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Renames an argument or local variable everywhere in the snippet."""
    nodes = [node for node in ast.walk(snippet.node) if isinstance(node, ast.Name | ast.arg)]
    counts = Counter(node.id if isinstance(node, ast.Name) else node.arg for node in nodes)
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    keywords = {node.arg for node in ast.walk(snippet.node) if isinstance(node, ast.keyword)}
    names = sorted(name for name in bound - keywords - {"self", "cls", "_"} if counts[name] >= 2)
    fresh = [name for name in NEW_NAMES if not re.search(rf"\b{name}\b", snippet.code)]
    if not names or not fresh or "nonlocal" in snippet.code or "global" in snippet.code:
        return None
    old, new = rng.choice(names), rng.choice(fresh)
    spans = []
    for node in nodes:
        if (node.id if isinstance(node, ast.Name) else node.arg) == old:
            start = offset(snippet.code, node.lineno, node.col_offset)
            if snippet.code[start : start + len(old)] != old:
                return None
            spans.append(Span(start, start + len(old), new))
    answer = apply(snippet.code, spans)
    request = rng.choice([
        "Rename the variable `{0}` to `{1}`.", "Rename `{0}` to `{1}` in this code.", "Replace the name {0} with {1}.",
        "Please rename `{0}` to `{1}` everywhere:", "Change the variable name `{0}` to `{1}`.",
    ]).format(old, new)  # fmt: skip
    return Turn(request, snippet.code, answer)


def rename_definition(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Renames the function or class itself."""
    old = snippet.node.name
    if old.startswith("__"):
        return None
    kind = "class" if isinstance(snippet.node, ast.ClassDef) else "function"
    word = rng.choice(NEW_NAMES)
    new = f"{old}{word.title()}" if kind == "class" else rng.choice([f"{old}_{word}", f"{word}_{old.lstrip('_')}"])
    answer = re.sub(rf"\b{re.escape(old)}\b", new, snippet.code)
    request = rng.choice([
        "Rename the {2} `{0}` to `{1}`.", "Rename {2} {0} to {1}.", "Give the {2} `{0}` the new name `{1}`.",
    ]).format(old, new, kind)  # fmt: skip
    return Turn(request, snippet.code, answer)


def docstring_span(snippet: Snippet) -> Span | None:
    """The span of the docstring's lines, or None without one or where nothing would remain."""
    node = snippet.node
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    start = offset(snippet.code, node.body[0].lineno, 0)
    end = offset(snippet.code, (node.body[0].end_lineno or node.body[0].lineno) + 1, 0)
    return Span(start, end, "")


def change_docstring(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Adds or removes the docstring."""
    span = docstring_span(snippet)
    if span is None or span.end - span.start > 900:
        return None
    without = apply(snippet.code, [span])
    kind = "class" if isinstance(snippet.node, ast.ClassDef) else "function"
    if rng.random() < 0.35:
        request = rng.choice(["Remove the docstring.", "Remove the docstring from this {0}.", "Drop the docstring:"])
        return Turn(request.format(kind), snippet.code, without)
    request = rng.choice([
        "Add a docstring to this {0}.", "Write a docstring for this {0}.", "Document the {0} `{1}`.",
        "Please add a docstring to `{1}`.", "Add a docstring:",
    ]).format(kind, snippet.node.name)  # fmt: skip
    return Turn(request, without, snippet.code)


def change_annotations(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Removes the type annotations of a function's signature, or adds them back."""
    node = snippet.node
    if isinstance(node, ast.ClassDef):
        return None
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [item for item in (node.args.vararg, node.args.kwarg) if item is not None]
    spans = [span_of(snippet.code, item, item.arg) for item in arguments if item.annotation is not None]
    if len(spans) < 1 or "# type" in snippet.code:
        return None
    if node.returns is not None:
        end = span_of(snippet.code, node.returns, "").end
        spans.append(Span(snippet.code.rfind("->", 0, end - 1), end, ""))
    bare = re.sub(r"\) +:", "):", apply(snippet.code, spans))
    if rng.random() < 0.5:
        request = rng.choice(["Remove the type annotations.", "Strip the hints from `{0}`.", "Drop the type hints."])
        return Turn(request.format(node.name), snippet.code, bare)
    request = rng.choice(["Add type annotations.", "Add type hints to `{0}`.", "Annotate the signature."])
    return Turn(request.format(node.name), bare, snippet.code)


def replace_constant(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Replaces one number or short string."""
    docstrings = {id(node.value) for node in ast.walk(snippet.node) if isinstance(node, ast.Expr)}
    formatted = [node for node in ast.walk(snippet.node) if isinstance(node, ast.JoinedStr)]
    inside = docstrings | {id(part) for node in formatted for part in ast.walk(node)}
    found = [
        node
        for node in ast.walk(snippet.node)
        if isinstance(node, ast.Constant) and id(node) not in inside and node.lineno == node.end_lineno
    ]
    numbers = [node for node in found if type(node.value) in (int, float) and node.value not in (0, 1)]
    words = [node for node in found if isinstance(node.value, str) and re.fullmatch(r"[A-Za-z][\w ]{2,20}", node.value)]
    if not numbers and not words:
        return None
    node = rng.choice(numbers or words)
    span = span_of(snippet.code, node, "")
    old = snippet.code[span.start : span.end]
    if snippet.code.count(old) != 1:
        return None
    if isinstance(node.value, str):
        word = rng.choice(NEW_NAMES)
        new = old[0] + word + old[-1] if old[0] in "'\"" else repr(word)
    else:
        new = rng.choice(["2", "3", "5", "7", "10", "16", "25", "42", "64", "100", "256", "1000", "0.5", "2.5"])
    if new == old:
        return None
    request = rng.choice([
        "Replace {0} with {1}.", "Change {0} to {1}.", "Use {1} instead of {0}.", "Change the constant `{0}` to `{1}`.",
    ]).format(old, new)  # fmt: skip
    return Turn(request, snippet.code, apply(snippet.code, [span._replace(text=new)]))


def add_parameter(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Adds a parameter with a default at the end of the signature."""
    node = snippet.node
    if isinstance(node, ast.ClassDef) or not node.args.args:
        return None
    if node.args.vararg or node.args.kwarg or node.args.kwonlyargs:
        return None
    name, default = rng.choice(NEW_PARAMETERS)
    if re.search(rf"\b{name}\b", snippet.code):
        return None
    last = node.args.defaults[-1] if node.args.defaults else node.args.args[-1]
    end = span_of(snippet.code, last, "").end
    equals = " = " if getattr(node.args.args[-1], "annotation", None) else "="
    request = rng.choice([
        "Add a parameter `{0}` with default {1} to `{2}`.", "Add the argument `{0}={1}`.",
        "Give `{2}` a new keyword parameter {0} that defaults to {1}.",
    ]).format(name, default, node.name)  # fmt: skip
    return Turn(request, snippet.code, apply(snippet.code, [Span(end, end, f", {name}{equals}{default}")]))


def make_async(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Turns a plain function into a coroutine function."""
    if not isinstance(snippet.node, ast.FunctionDef) or len(snippet.code) > 900:
        return None
    start = offset(snippet.code, snippet.node.lineno, 0)
    request = rng.choice(["Make this function async.", "Turn `{0}` into an async function.", "Make `{0}` a coroutine."])
    return Turn(request.format(snippet.node.name), snippet.code, apply(snippet.code, [Span(start, start, "async ")]))


def first_sentence(snippet: Snippet) -> str | None:
    """The first sentence of the docstring, where it is plain prose of a useful length."""
    text = " ".join(inspect.cleandoc(ast.get_docstring(snippet.node) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)`'\"])\.(?:\s|$)", text)[0].rstrip(".:")
    plain = 20 <= len(sentence) <= 200 and re.match(r"[A-Z][a-z]+ ", sentence) and ":param" not in sentence
    return sentence if plain else None


def write_function(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Asks for the function that the docstring describes; half of the answers keep the docstring."""
    sentence = first_sentence(snippet)
    node = snippet.node
    if sentence is None or isinstance(node, ast.ClassDef) or node.name.startswith("__") or len(snippet.code) > 1500:
        return None
    first, rest = sentence.split(" ", 1)
    third = first.lower() if first.endswith("s") else first.lower() + ("es" if first.endswith(("sh", "ch")) else "s")
    request = rng.choice([
        "Write a function `{name}` that {third} {rest}.", "Write a Python function `{name}` that {third} {rest}.",
        "Write a Python function called {name} that {third} {rest}.", "Implement `{name}({args})`: {sentence}.",
        "Implement a function `{name}` that {third} {rest}.", "I need a function `{name}({args})`. {sentence}.",
        "Write a function that {third} {rest}.",
    ])  # fmt: skip
    if not re.fullmatch(r"[a-z]+", first.lower()) or keyword.iskeyword(first.lower()):
        return None
    names = ", ".join(item.arg for item in node.args.args)
    text = request.format(name=node.name, third=third, rest=rest, args=names, sentence=sentence)
    span = docstring_span(snippet)
    answer = apply(snippet.code, [span]) if span and rng.random() < 0.5 else snippet.code
    return Turn(text, "", answer)


def summarise(snippet: Snippet, rng: random.Random) -> Turn | None:
    """Asks what the code does; the answer is the docstring's first sentence, which the code then lacks."""
    sentence, span = first_sentence(snippet), docstring_span(snippet)
    if sentence is None or span is None:
        return None
    request = rng.choice(["What does this code do?", "Summarise this code in one sentence.", "Explain `{0}` briefly."])
    return Turn(request.format(snippet.node.name), apply(snippet.code, [span]), sentence + ".")


Maker = Callable[[Snippet, random.Random], Turn | None]
EDITS: list[Maker] = [
    rename_variable, rename_variable, rename_definition, change_docstring, change_annotations, replace_constant,
    add_parameter, make_async,
]  # fmt: skip
OTHERS: list[Maker] = [write_function, write_function, write_function, summarise]


def fenced(code: str) -> str:
    """`code` in a Markdown fence."""
    return f"```python\n{code}\n```"


def render(turns: list[tuple[str, str]]) -> str:
    """ChatML of (request, answer) pairs; an empty last answer leaves the assistant's turn open."""
    text = ""
    for request, answer in turns:
        text += f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
        text += f"{answer}<|im_end|>\n" if answer else ""
    return text


def message(turn: Turn, rng: random.Random) -> str:
    """The user's message: the request before or after the code."""
    if not turn.code:
        return turn.request
    if rng.random() < 0.8:
        return f"{turn.request}\n\n{fenced(turn.code)}"
    return f"{fenced(turn.code)}\n\n{turn.request}"


def edit_turn(snippet: Snippet, rng: random.Random) -> Turn | None:
    """A random edit that applies to the snippet, changes it and leaves it parseable."""
    for make in rng.sample(EDITS, len(EDITS)):
        turn = make(snippet, rng)
        if turn is not None and turn.answer != turn.code:
            try:
                ast.parse(turn.answer)
                ast.parse(turn.code)
            except SyntaxError:
                continue
            return turn
    return None


def edit_chat(snippet: Snippet, rng: random.Random) -> str | None:
    """One edit, in one chat of six followed by a second edit of the answer."""
    turn = edit_turn(snippet, rng)
    if turn is None:
        return None
    turns = [(message(turn, rng), fenced(turn.answer))]
    if rng.random() < 1 / 6:
        node = ast.parse(turn.answer).body[0]
        if isinstance(node, FunctionNode | ast.ClassDef):
            second = edit_turn(Snippet(turn.answer, node), rng)
            if second is not None and second.code == turn.answer:
                turns.append((second.request, fenced(second.answer)))
    return render(turns)


def other_chat(snippet: Snippet, rng: random.Random) -> str | None:
    """A function written from its description, or a summary."""
    turn = rng.choice(OTHERS)(snippet, rng)
    if turn is None:
        return None
    answer = turn.answer if turn.code else fenced(turn.answer)
    return render([(message(turn, rng), answer)])


def repeated_file(text: str, rng: random.Random) -> str | None:
    """A short file followed by a copy of itself with one definition renamed."""
    names = [node.name for node in ast.parse(text).body if isinstance(node, FunctionNode | ast.ClassDef)]
    if not names or len(text) > 3000:
        return None
    old = rng.choice(names)
    new = f"{old}_{rng.choice(NEW_NAMES)}"
    edited = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return f"{text}\n\n# The same file with {old} renamed to {new}:\n\n{edited}"


def generate(texts: list[str], budget: int) -> Iterator[str]:
    """Yields chat and repeated-file documents from `texts` in an order fixed by their hash, `budget` characters."""
    total = repeats = 0
    for text in sorted(texts, key=stable_hash):
        rng = random.Random(stable_hash(text))
        found = list(snippets(text))
        documents = [repeated_file(text, rng) if repeats < budget * REPEAT_SHARE / CHAT_SHARE else None]
        repeats += len(documents[0] or "")
        for snippet in rng.sample(found, min(3, len(found))):
            documents.append((edit_chat if rng.random() < 0.6 else other_chat)(snippet, rng))
        for document in documents:
            if document is not None:
                total += len(document)
                yield document
        if total > budget:
            return


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bundle"))
    work = parser.parse_args().work
    with open(work / "train.jsonl") as file:
        texts = [json.loads(line)["text"] for line in file]
    documents = list(generate(texts, int(CHAT_SHARE * sum(map(len, texts)))))
    with open(work / "chat.jsonl", "w") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
