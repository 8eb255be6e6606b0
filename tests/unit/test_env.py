"""The variables that outrider looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider import env
from outrider.errors import OptionError
from outrider.server.options import ServerOptions


def test_an_empty_key_lets_nobody_in_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.API_KEY, "")
    with pytest.raises(OptionError, match="unset OUTRIDER_API_KEY"):
        ServerOptions().keys(env.api_key())
    monkeypatch.delenv(env.API_KEY)
    assert ServerOptions().keys(env.api_key()) == ()


def test_the_cache_directory_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Dockerfile's ENV expands no tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OUTRIDER_CACHE_DIR", "~/kept")
    assert env.cache_directory() == tmp_path / "kept"
