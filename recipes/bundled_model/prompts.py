"""Writes heldout_prompts.jsonl and edit_prompts.jsonl from packages and files that are not in the training split.

    python prompts.py --work DIR --out DIR

A held-out prompt is the head of a file, cut after the signature (and docstring, if any) of a function; the reference
is how the file goes on. An edit prompt is a ChatML request that shows code and asks for a small edit of it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from pathlib import Path
from typing import Any

from corpus import stable_hash
from instructions import FunctionNode, Snippet, edit_turn, fenced, message, render, snippets
from tokenizers import Tokenizer

PROMPTS, EDITS = 256, 64
PACKAGED = Path(__file__).parents[2] / "src" / "outrider" / "bundled" / "prompts"


def read(path: Path) -> list[dict[str, str]]:
    """The documents of a JSONL file."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def source_of(document: dict[str, str]) -> dict[str, str]:
    """Where a document comes from."""
    return {key: document[key] for key in ("package", "version", "licence", "path")}


def cuts(text: str) -> list[int]:
    """Character positions right after the signature line or docstring of each function of a file."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FunctionNode) and len(node.body) > 1:
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            found.append(starts[first.end_lineno or first.lineno] if has_docstring else starts[first.lineno - 1])
    return found


def completion_prompt(document: dict[str, str], tokenizer: Tokenizer, rng: random.Random) -> tuple[str, str] | None:
    """A (prompt, reference) pair: context from the start of a top-level block to where a function's body begins."""
    text = document["text"]
    if not text.isascii():
        return None
    positions = cuts(text)
    for position in rng.sample(positions, len(positions)):
        begins = [0, *(match.end() for match in re.finditer(r"\n\n+(?=\S)", text[:position]))]
        prompt = next((text[i:position] for i in begins if len(tokenizer.encode(text[i:position]).ids) <= 250), "")
        reference = tokenizer.decode(tokenizer.encode(text[position:]).ids[:256])
        if len(tokenizer.encode(prompt).ids) >= 60 and len(tokenizer.encode(reference).ids) >= 32:
            return prompt, reference
    return None


def edit_prompt(text: str, tokenizer: Tokenizer, rng: random.Random) -> tuple[str, str] | None:
    """A (prompt, reference) pair of a code edit whose prompt has 150 to 500 tokens."""
    found: list[Snippet] = list(snippets(text))
    for snippet in rng.sample(found, len(found)):
        turn = edit_turn(snippet, rng)
        if turn is None:
            continue
        answer = fenced(turn.answer)
        prompt = render([(message(turn, rng), "")])
        if 150 <= len(tokenizer.encode(prompt).ids) <= 500 and len(tokenizer.encode(answer).ids) <= 512:
            return prompt, answer
    return None


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes records as JSON lines, with ids."""
    with open(path, "w") as file:
        for index, record in enumerate(records):
            file.write(json.dumps({"id": f"{path.stem.split('_')[0]}-{index:03d}"} | record) + "\n")
    print(f"{path.name}: {len(records)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bundle"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer" / "tokenizer.json"))
    documents = read(options.work / "heldout.jsonl") + read(options.work / "validation.jsonl")
    documents.sort(key=lambda document: stable_hash(document["package"] + document["path"]))
    prompts: list[dict[str, Any]] = []
    edits: list[dict[str, Any]] = []
    for document in documents:
        rng = random.Random(stable_hash(document["path"]))
        if len(edits) < EDITS and (pair := edit_prompt(document["text"], tokenizer, rng)):
            edits.append({"source": source_of(document), "prompt": pair[0], "reference": pair[1]})
        if len(prompts) < PROMPTS and (pair := completion_prompt(document, tokenizer, rng)):
            prompts.append({"source": source_of(document), "prompt": pair[0], "reference": pair[1]})
    write(options.out / "heldout_prompts.jsonl", prompts)
    write(options.out / "edit_prompts.jsonl", edits)


if __name__ == "__main__":
    main()
