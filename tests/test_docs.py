"""The documentation: what it says of the code, where it links, how it reads, and that its site builds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from outrider.cli.main import app
from outrider.core.sampling import SamplingParams
from outrider.draft.registry import METHODS
from outrider.options import EngineOptions
from outrider.server.options import ServerOptions
from outrider.train.options import TrainOptions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import prose  # noqa: E402

PAGES = [
    *prose.pages(),
    *sorted(path for path in (ROOT / "docs" / "reference").glob("*.md") if path.name in prose.GENERATED),
]
RECIPES = [ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").rglob("*.md"))]
PLANNED = "## What a new part touches"
"""What comes under this heading names files that are not there yet."""
NOT_RUN = re.compile(r"<!-- not run: .{10,} -->\n\Z")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- what the reference says


def test_the_reference_is_what_the_code_says() -> None:
    pytest.importorskip("fastapi")
    import write_reference as reference

    for name, text in reference.pages_of_code().items():
        page = ROOT / "docs" / "reference" / name
        assert page.read_text() == text, f"write {name_of(page)} again: make reference"


def undescribed(record: type[Any]) -> list[str]:
    return [
        f"{record.__name__}.{entry.name}"
        for entry in fields(record)
        if not entry.metadata.get("derived") and len(entry.metadata.get("help", "")) < 4
    ]


def test_every_option_has_a_description() -> None:
    records = [EngineOptions, SamplingParams, ServerOptions, TrainOptions, *(one.Options for one in METHODS.values())]
    assert [name for record in records for name in undescribed(record)] == []


def test_every_flag_has_a_description() -> None:
    group: Any = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["bench"].commands}
    assert [name for name, command in commands.items() if not command.help] == []
    flags = [(name, one.name) for name, command in commands.items() for one in command.params if not one.help]
    assert flags == []


def test_every_field_of_a_request_has_a_description() -> None:
    pytest.importorskip("fastapi")
    import write_reference as reference

    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", reference.fields_page().split("## Not offered")[0], re.MULTILINE)
    assert len(rows) > 50 and [name for name, meaning in rows if not meaning.strip()] == []


def test_an_option_without_a_description_is_found() -> None:
    from dataclasses import dataclass

    from outrider.core.option import option

    @dataclass
    class Planted:
        said: int = option(1, "it has one")
        silent: int = option(1, "")

    assert undescribed(Planted) == ["Planted.silent"]


# --- where it links


def anchors(text: str) -> set[str]:
    """The addresses of a page's headings, as GitHub and MkDocs both make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"\s+", "-", slug))
    return found


def dead_links(page: Path, text: str) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    dead = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text()) == []


def test_a_dead_link_is_found() -> None:
    planted = "[a](gone.md) [b](STYLE.md#gone) [c](#gone) [d](STYLE.md#names) [e](https://example.org/gone)"
    assert dead_links(ROOT / "README.md", planted) == ["gone.md", "STYLE.md#gone", "#gone"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text().split(PLANNED)[0], flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|json|md))`", text)
    places = [ROOT, ROOT / "src" / "outrider", ROOT / "benchmarks", ROOT / "tests"]
    assert [one for one in named if not any((place / one).exists() for place in places)] == [], "no such file"


# --- what it tells a reader to type


def code_blocks(text: str) -> list[tuple[str, str, bool]]:
    """Language and code of each block, and whether the page says why it is not run."""
    return [
        (match[1], match[2], bool(NOT_RUN.search(text[: match.start()])))
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def strange_line(line: str) -> bool:
    """Whether a line of a shell block is of a kind that no test looks at."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S+", words[0]):
        words.pop(0)
    return bool(words) and words[0] not in ("outrider", "curl", "make", "python")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_run_or_say_why_not(page: Path) -> None:
    """Shell and Python blocks are run by test_examples; blocks without a language and JSON are nothing to run."""
    for language, code, says_why in code_blocks(page.read_text()):
        assert language in ("sh", "python", "", "json") or says_why, f"say why it is not run: {code}"
        if language == "sh":
            assert [line for line in code.splitlines() if strange_line(line)] == [], "no test knows how to run this"


def test_a_block_without_a_reason_is_found() -> None:
    planted = "```console\nrm -rf /\n```\n<!-- not run: it needs a GPU -->\n```console\nls\n```\n"
    assert [says_why for _, _, says_why in code_blocks(planted)] == [False, True]
    assert strange_line("rm -rf /") and not strange_line("A=1 outrider explain  # that")


def lines_to_type() -> list[list[str]]:
    """Every line of a block for a shell, run or not, as words without variables set in front."""
    found = []
    for page in PAGES:
        for language, code, _ in code_blocks(page.read_text()):
            for line in code.splitlines() if language in ("sh", "console") else ():
                words = shlex.split(line.replace(" ... ", " "), comments=True)
                while words and re.fullmatch(r"\w+=\S+", words[0]):
                    words.pop(0)
                found += [words] if words else []
    return found


def parse(first: str, *rest: str) -> None:
    """Raises what the command line would answer to an unknown command or flag."""
    group: Any = typer.main.get_command(app)
    command = group.commands[first]
    if hasattr(command, "commands"):
        first, *words = rest
        command = command.commands[first]
        rest = tuple(words)
    command.make_context(first, list(rest))


def test_every_documented_command_parses() -> None:
    lines = [words[1:] for words in lines_to_type() if words[0] == "outrider"]
    assert len(lines) >= 20
    for words in lines:
        parse(*words)
    with pytest.raises(Exception, match="--gone"):
        parse("bench", "latency", "--gone")


def unknown_flags(words: list[str]) -> list[str]:
    """Flags of a documented `python benchmarks/...` line that neither the script nor what it imports holds."""
    script = ROOT / words[1]
    sources = [script, *script.parent.glob("_*.py"), *(ROOT / "src" / "outrider" / "bench").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    return [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in text]


def test_documented_scripts_know_their_flags() -> None:
    lines = [words for words in lines_to_type() if words[0] == "python"]
    assert len(lines) >= 5
    assert [flag for words in lines for flag in unknown_flags(words)] == []
    assert unknown_flags(["python", "benchmarks/mixed_steps.py", "--gone"]) == ["--gone"]


def test_documented_targets_and_extras_exist() -> None:
    text = "".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert said and said <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {extra for match in re.findall(r"\.\[([\w,]+)\]", text) for extra in match.split(",")}
    assert asked and asked <= set(extras)


# --- how it reads


@pytest.mark.parametrize("page", prose.pages(), ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    assert prose.faults(page.read_text()) == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    assert [f"line {line}: {word}: write {prose.WORDS[word]}" for word, line in prose.words_in(page.read_text())] == []


def test_sources_use_the_words_of_the_field() -> None:
    """Docstrings, comments and messages."""
    found = [
        f"{name_of(path)}:{line}: {word}: write {prose.WORDS[word]}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for word, line in prose.words_in(prose.prose_of(path.read_text()))
    ]
    assert found == []


def test_names_in_sources_are_those_of_the_field() -> None:
    found = [
        f"{name_of(path)}:{line}: {name}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for name, line in prose.names_in(path.read_text())
    ]
    assert found == []


def test_the_checks_of_prose_can_fail() -> None:
    long = "Word " + "word " * 31 + "end. "
    assert len(prose.faults(long * 2)) == 3 and prose.faults("One short sentence. Another one.") == []
    assert prose.figures("A `b c` d, 3.5 of [five](six). Seven eight!\n\n- nine\n- ten\n").words == 11
    assert list(prose.words_in("it was told\nof tolds and so-told\nAnew")) == [("told", 1), ("anew", 3)]
    assert list(prose.names_in("_draft_law = flaw\nclass SeatMap: lawn = 1\n")) == [("_draft_law", 1), ("SeatMap", 2)]
    assert prose.prose_of('told = 1  # law\nsaid = "seat"\n').split() == ["#", "law", '"seat"']


# --- the site


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    start = (tmp_path / "site" / "index.html").read_text()
    assert "files/CONTRIBUTING.html" in start, "a file outside docs is a page of the site"
    loaded = re.findall(r"(?:src|href)=\"(https?://[^\"]+\.(?:js|css|woff2?))", start)
    assert loaded == [], "the site loads nothing from elsewhere"
