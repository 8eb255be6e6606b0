"""MkDocs hook: a page may link to any file of the repository, and the site carries a copy of it.

On GitHub and in an editor such links work as they are. Markdown files outside docs become pages of the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
COPIES = "files"
"""Folder of the site that holds the files from outside docs."""


def on_files(files: Files, config: Any) -> Files:
    """Adds every file that a page links to, and those that the added pages link to."""
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while waiting:
        for path in sorted(linked(waiting.pop())):
            if path.is_file() and DOCS not in path.parents and files.get_file_from_path(address(path)) is None:
                added = File.generated(config, address(path), abs_src_path=str(path))
                added.inclusion = added.inclusion.NOT_IN_NAV
                files.append(added)
                waiting += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them."""
    source, own = Path(page.file.abs_src_path), Path(page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match[1]))
        return f"]({os.path.relpath(address(target), own)}{match[2] or ''})"

    return LINK.sub(rewritten, markdown)


def linked(page: Path) -> set[Path]:
    """The files that a page links to."""
    if page.suffix != ".md":
        return set()
    return {Path(os.path.normpath(page.parent / match[1])) for match in LINK.finditer(page.read_text())}


def address(path: Path) -> str:
    """Where the site has a file of the repository."""
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return f"{COPIES}/{path.relative_to(ROOT).as_posix()}"
