"""`outrider doctor` says what there is, and how to get what is not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

import outrider
from outrider import env
from outrider.cli import doctor
from outrider.cli import main as cli


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["outrider", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_it_names_versions_devices_and_caches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(env.CACHE, str(tmp_path))
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "one.json").write_text("x" * 100)
    found = json.loads(run(capsys, monkeypatch, "--json"))
    assert found["outrider"]["version"] == outrider.__version__ and found["versions"]["torch"]
    assert found["devices"][0]["device"] == "cpu" and 0 < found["devices"][0]["free"] < found["devices"][0]["memory"]
    caches = {cache["what"]: cache for cache in found["caches"]}
    assert caches["tokenizers"]["bytes"] == 100 and caches["tokenizers"]["directory"] == str(tmp_path / "tokenizers")
    assert caches["compiled CPU kernels"]["directory"] and found["missing"] == []
    shown = run(capsys, monkeypatch)
    assert "nothing is missing" in shown and found["versions"]["torch"] in shown


def test_it_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str, *given: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)
        return None if name == "zmq" else util.find_spec(name, *given)

    monkeypatch.setattr(doctor, "find_spec", find_spec)
    missing = {one["package"]: one for one in json.loads(run(capsys, monkeypatch, "--json"))["missing"]}
    assert missing["pyzmq"]["for"] == "outrider serve"
    assert missing["pyzmq"]["get"] == f"{sys.executable} -m pip install pyzmq"
    assert "opentelemetry-sdk" in missing and "fastapi" not in missing
    assert "-m pip install pyzmq" in run(capsys, monkeypatch)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert doctor._described("x", tmp_path / "new" / "deep")["writable"]
    assert not doctor._described("x", tmp_path / "file" / "inside")["writable"]
    assert not doctor._described("x", None)["writable"]


def test_a_cache_that_may_not_be_looked_into_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the home of another user. Root may look into everything, so the refusal is made here."""
    hidden = str(tmp_path / "home")

    def refuse(of: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(path: Any, *given: Any, **named: Any) -> Any:
            if str(path).startswith(hidden):
                raise PermissionError(path)
            return of(path, *given, **named)

        return refusing

    for name in ("stat", "lstat", "scandir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    with pytest.raises(PermissionError):
        os.stat(hidden)
    (tmp_path / "one").write_text("x" * 7)
    assert doctor._described("x", Path(hidden) / "cache")["bytes"] == 0
    assert doctor._described("x", tmp_path)["bytes"] == 7
