"""`outrider explain` says what `serve` and `generate` do with the same arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heads import tiny_head
from outrider.cli import main as cli
from outrider.cli.common import describe_head
from outrider.config import resolve
from outrider.engine.llm import LLM
from outrider.options import EngineOptions
from outrider.server import serve as serving

ARGUMENTS = [
    [],
    ["-k", "3"],
    ["--draft", "none"],
    ["--draft", "ngram"],
    ["--draft", "ngram", "-k", "2", "--max-model-len", "64"],
    ["--draft", "eagle3"],
    ["--draft", "eagle3", "-k", "5", "--verifier", "rejection"],
    ["--speculative-config", "{}"],
    ["--speculative-config", '{"method": "none"}'],
    ["--speculative-config", '{"method": "ngram", "prompt_lookup_max": 3}'],
    ["--speculative-config", '{"num_speculative_tokens": 2}'],
    ["--verifier", "synthetic", "--synthetic-rates", ".5,.4,.3,.2,.1,.1,.1"],
    ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "4"],
    ["--kv-cache-memory", "100000000", "--max-num-batched-tokens", "512"],
    ["MODEL"],
    ["MODEL", "-k", "2"],
    ["MODEL", "--draft", "none"],
    ["MODEL", "--draft", "HEAD"],
    ["MODEL", "--draft", "HEAD", "-k", "2"],
    ["MODEL", "--speculative-config", '{"model": "HEAD", "num_speculative_tokens": 3}'],
]
REFUSED = [
    ["--draft", "nrgam"],
    ["-k", "0"],
    ["--draft", "none", "--speculative-config", '{"method": "ngram"}'],
    ["--speculative-config", "[]"],
    ["--tensor-parallel-size", "2"],
    ["--runner", "graf"],
    ["MODEL", "--draft", "peagle"],
    ["MODEL", "--max-model-len", "1000000"],
]


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineOptions]:
    """What a command starts its engine with; SystemExit with the code that it ends with if it does not."""
    found: list[EngineOptions] = []

    def started(options: EngineOptions, *given: Any, **named: Any) -> Any:
        found.append(options)
        raise SystemExit(0)

    monkeypatch.setattr(LLM, "from_options", started)
    monkeypatch.setattr(serving, "serve", started)

    def options(*arguments: str) -> EngineOptions:
        monkeypatch.setattr(sys, "argv", ["outrider", *arguments])
        found.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        if not found:
            raise SystemExit(ended.value.code)
        return found[0]

    return options


@pytest.fixture
def filled(tiny: Callable[..., Path]) -> Callable[[list[str]], list[str]]:
    return lambda arguments: [
        each.replace("MODEL", str(tiny("qwen3"))).replace("HEAD", tiny_head(True)) for each in arguments
    ]


def explained(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["outrider", "explain", *arguments, "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_explain_tells_what_serve_and_generate_do(
    arguments: list[str],
    filled: Callable[[list[str]], list[str]],
    options_of: Callable[..., EngineOptions],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = filled(arguments)
    served, generated = options_of("serve", *given), options_of("generate", *given, "--prompt", "a")
    # --seed is the request's there, and no run may profit from the one before
    assert replace(generated, seed=served.seed, enable_prefix_caching=served.enable_prefix_caching) == served
    code, told = explained(given, capsys, monkeypatch)
    resolved = resolve(served)
    runner = resolved.runner
    assert code == 0 and told.items() >= {
        "runner": resolved.served_by().runner.name,
        "method": resolved.method,
        "num_speculative_tokens": runner.draft_options.num_speculative_tokens,
        "head": describe_head(resolved),
        "verifier": runner.verifier.name,
        "max_model_len": runner.sizes.max_model_len,
        "dtype": str(runner.dtype).removeprefix("torch."),
    }.items()  # fmt: skip
    assert told["memory"]["num_blocks"] > 0


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_one_refuses_all_refuse(
    arguments: list[str],
    filled: Callable[[list[str]], list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, said = filled(arguments), []
    for command in (["explain"], ["serve"], ["generate", "--prompt", "a"]):
        monkeypatch.setattr(sys, "argv", ["outrider", *command, *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said.append((ended.value.code, capsys.readouterr().err))
    assert said[0][0] == 2 and said[0][1].startswith("error: ")
    assert said == said[:1] * 3


def test_the_bundled_model_is_explained_with_its_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, told = explained([], capsys, monkeypatch)
    assert told["method"] != "none" and told["num_speculative_tokens"] == 7 and told["head"]
