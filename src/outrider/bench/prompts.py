"""Prompt sets: JSONL files with a `prompt` a line, and the two that come with the bundled model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider.errors import InputError, PromptError
from outrider.load.hub import BUNDLED

HELD_OUT = BUNDLED / "prompts" / "heldout_prompts.jsonl"
"""Beginnings of files that the bundled model was not trained on."""

EDITS = BUNDLED / "prompts" / "edit_prompts.jsonl"
"""Requests to edit code, whose answers mostly repeat it; from such files too."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Texts to complete, and a name for exactly these texts."""

    name: str
    texts: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Changes with any text or their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]

    def first(self, count: int | None) -> PromptSet:
        """The first `count`, or all."""
        return self if count is None else PromptSet(self.name, self.texts[:count])


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a JSONL file, or PromptError naming the line at fault."""
    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts: {error}") from error
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PromptError(f'{path}:{number}: not a JSON object with a "prompt": {error}') from error
        if not isinstance(text, str) or not text:
            raise PromptError(f"{path}:{number}: prompt must be a text that is not empty")
        texts.append(text)
    if not texts:
        raise PromptError(f"no prompts in {path}")
    return PromptSet(path.stem, tuple(texts))
