"""How the prose reads: words a sentence in README and docs, and words that have a better one in the field.

    python tools/prose.py            # figures of each page, and every word to replace

Tables, code blocks and headings are left out. A list item ends a sentence.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = {"support.md", "options.md", "python.md", "request_fields.md", "metrics.md", "json.md"}
"""Pages of docs/reference that a script writes; their words are those of the code."""

MEAN_WORDS = 17
LONG_WORDS = 30
LONG_SHARE = 0.05

WORDS = {
    "law": "distribution",
    "seat": "running request, or slot",
    "roster": "request queues",
    "sketch": "plan builder",
    "decree": "synthetic acceptance",
    "temper": "scale, or divide by the temperature",
    "tempered": "scaled",
    "barred": "banned, or masked",
    "tap": "auxiliary hidden state",
    "taps": "auxiliary hidden states",
    "tapped": "auxiliary",
    "told": "reported, or notified",
    "under way": "running, or in flight",
    "made to stand": "accepted",
    "drafts stand": "drafts are accepted",
    "drafts stood": "drafts were accepted",
    "that stood": "that were accepted",
    "stands in": "is in",
    "speaks": "samples, or supports",
    "the bar": "the target, with its figure",
    "anew": "again",
    "manners": "behaviour",
    "lingers": "is in flight",
    "of late": "recent",
    "for want of": "for lack of",
    "dear": "expensive",
    "heeds": "uses",
    "an engineer": "leave it out: the finding counts, not who made it",
    "device time": "leave it out: the finding counts, not what it took",
}
"""Words of no paper and no other engine, or that a reader has to read twice; each with what to write instead.

A reader who knows vLLM looks for the field's word, and finds nothing under a private one.
"""

NAMES = frozenset(
    {
        "barred",
        "decree",
        "law",
        "least",
        "lingers",
        "most",
        "narrow",
        "place",
        "places",
        "roster",
        "seat",
        "sketch",
        "speaks",
        "spoken",
        "stand",
        "stands",
        "tap",
        "tapped",
        "taps",
        "tell",
        "temper",
        "told",
    }
)
"""Words that no name in `src` may hold: parts of names between underscores or capitals."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How a text reads."""

    sentences: int
    words: int
    longest: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Words a sentence."""
        return self.words / max(self.sentences, 1)

    @property
    def share(self) -> float:
        """The share of sentences with more than `LONG_WORDS` words."""
        return len(self.longest) / max(self.sentences, 1)


def pages() -> list[Path]:
    """What a person writes and a reader reads."""
    written = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in GENERATED]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("STYLE.md")), *written]


def paragraphs(text: str) -> Iterator[str]:
    """Running text without code blocks, tables, headings and addresses of links; each list item by itself."""
    text = re.sub(r"^```.*?^```", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "\n", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    kept: list[str] = []
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        starts_item = re.match(r"([-*]|\d+\.)\s+", bare)
        if not bare or bare.startswith(("#", "|", "!!!")) or starts_item:
            if kept:
                yield " ".join(kept)
            kept = [bare[starts_item.end() :]] if starts_item else []
        else:
            kept.append(bare)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page."""
    for paragraph in paragraphs(text):
        for sentence in re.split(r"(?<=[.!?])[)*\"]*\s+(?=[A-Z0-9`*(\"\[])", paragraph):
            if re.search(r"[A-Za-z]", sentence):
                yield sentence


def figures(text: str) -> Figures:
    """Sentences, words, and the sentences that are too long."""
    found = list(sentences(text))
    counts = [sum(bool(re.search(r"\w", word)) for word in sentence.split()) for sentence in found]
    longest = tuple(one for one, count in zip(found, counts, strict=True) if count > LONG_WORDS)
    return Figures(len(found), sum(counts), longest)


def faults(text: str) -> list[str]:
    """What is wrong with a page's sentences; a short page may have one long sentence."""
    measured = figures(text)
    found = []
    if measured.mean >= MEAN_WORDS:
        found.append(f"{measured.mean:.1f} words a sentence, {MEAN_WORDS} are too many")
    if len(measured.longest) > max(1, LONG_SHARE * measured.sentences):
        found += [f"over {LONG_WORDS} words: {sentence}" for sentence in measured.longest]
    return found


def words_in(text: str) -> Iterator[tuple[str, int]]:
    """Words of `WORDS` in a text, each with its line."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in WORDS:
            if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", line, re.IGNORECASE):
                yield word, number


def prose_of(source: str) -> str:
    """A Python file with its comments and texts only, line by line."""
    lines = [""] * (source.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            for offset, line in enumerate(token.string.splitlines()):
                lines[token.start[0] - 1 + offset] += " " + line
    return "\n".join(lines)


def names_in(source: str) -> Iterator[tuple[str, int]]:
    """Names of a Python file that hold one of `NAMES`, each with its line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            parts = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", token.string)
            if not NAMES.isdisjoint(part.lower() for part in parts):
                yield token.string, token.start[0]


def main() -> None:
    """Prints the figures of each page, and of all pages together."""
    found = {path: figures(path.read_text()) for path in pages()}
    for path, one in found.items():
        name = path.relative_to(ROOT)
        print(f"{name!s:42} {one.sentences:4} sentences, {one.mean:5.1f} words each, {one.share:6.1%} too long")
    count = sum(one.sentences for one in found.values())
    mean = sum(one.words for one in found.values()) / count
    print(f"all: {mean:.1f} words, {sum(len(one.longest) for one in found.values()) / count:.1%} too long")
    sources = {path: prose_of(path.read_text()) for path in sorted((ROOT / "src").rglob("*.py"))}
    for path, text in [*((path, path.read_text()) for path in found), *sources.items()]:
        for word, line in words_in(text):
            print(f"{path.relative_to(ROOT)}:{line}: {word}: write {WORDS[word]}")


if __name__ == "__main__":
    main()
