"""The variables that outrider looks at."""

from __future__ import annotations

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
