"""Sizes as people write them, and help that fits a terminal."""

from __future__ import annotations

import sys

import pytest
import typer

from outrider.cli import main as cli
from outrider.cli.flags import whole_number


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ("4096", 4096),
        ("-1", -1),
        ("1_000", 1000),
        ("32k", 32_000),
        ("32K", 32_768),
        ("25.6k", 25_600),
        ("1GiB", 1 << 30),
        ("1gib", 1 << 30),
        ("1GB", 10**9),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        (" 7 ", 7),
        (12, 12),
    ],
)
def test_a_size_is_read(given: str | int, number: int) -> None:
    assert whole_number(given) == number


@pytest.mark.parametrize("given", ["", "k", "1x", "1.5", "0.0001k", "1 GiB 2", "0x10", "1e3", "١", "nan", "1GiBB"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(typer.BadParameter, match="whole number"):
        whole_number(given)


def help_of(*command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["outrider", *command])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "generate", "explain", "accept", "train"])
def test_help_stands_in_groups_that_fit(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(command, "-h", capsys=capsys, monkeypatch=monkeypatch)
    assert shown == help_of(command, "--help", capsys=capsys, monkeypatch=monkeypatch)
    assert all(len(line) <= 80 for line in shown.splitlines())
    groups = {"serve": ("Engine", "Drafting", "Server"), "generate": ("Engine", "Drafting", "Sampling")}
    own = ("Training",) if command == "train" else ("Engine", "Drafting")
    assert all(f"{group} options" in shown for group in groups.get(command, own))


def test_bench_alone_shows_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "latency" in help_of("bench", capsys=capsys, monkeypatch=monkeypatch)
