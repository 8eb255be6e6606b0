"""The command line: JSON shapes that scripts rely on, exit codes, and one clear line for wrong input."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from checkpoints import EOS, write, write_tokenizer
from heads import TAPS, head_tensors, tiny_head
from outrider.cli import common
from outrider.cli import main as cli
from outrider.cli import serve as serve_command
from outrider.cli.common import Drafting
from outrider.core.sizes import MIB
from outrider.draft.base import BUNDLED_MODEL
from outrider.draft.registry import default_method, names_head
from outrider.engine.engine import Engine
from outrider.errors import OptionError
from outrider.load.hub import BUNDLED
from outrider.server import serve as server
from outrider.workers.base import WorkerStats

SHORT = ["--max-tokens", "12"]


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["outrider", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def outrider(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(list(arguments), capsys, monkeypatch)


def test_generate_json(outrider: Any) -> None:
    code, out, _ = outrider("generate", "--prompt", "def add(a, b):", "--json", *SHORT)
    result = json.loads(out)
    assert code == 0
    assert len(result["token_ids"]) <= 12 and isinstance(result["text"], str)
    assert result["tokens_per_second"] > 0
    assert result["acceptance"].keys() >= {"drafts", "drafted", "accepted", "per_position", "acceptance_length"}


def test_generate_compare_json(outrider: Any) -> None:
    _, out, _ = outrider("generate", "--prompt", "x = [1, 2, 3]\n", "--compare", "--json", *SHORT)
    result = json.loads(out)
    assert result["identical"] is True
    assert result["speedup"] > 0
    assert result["tokens_per_second"].keys() == {"with", "without"}


def test_generate_compare_of_sampled_text_is_identical(outrider: Any) -> None:
    sampled = ["--temperature", "1.0", "--top-p", "0.9", "--seed", "3"]
    _, out, _ = outrider("generate", "--prompt", "import os\n", "--compare", "--json", *sampled, *SHORT)
    assert json.loads(out)["identical"] is True


def test_generate_prints_text_and_figures(outrider: Any) -> None:
    code, out, err = outrider("generate", "--prompt", "class Point:\n", *SHORT)
    assert code == 0 and out.strip()
    assert "tokens" in err and "runner eager" in err


def test_explain_json(outrider: Any) -> None:
    code, out, _ = outrider("explain", "--draft", "ngram", "-k", "5", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["runner"] == "eager" and result["method"] == "ngram" and result["num_speculative_tokens"] == 5
    assert result["memory"]["num_blocks"] > 0
    if result["device"] == "cpu":
        (reason,) = result["passed_over"]
        assert (reason["runner"], reason["feature"]) == ("graph", "cpu") and "no CUDA graphs" in reason["reason"]


def test_explain_shows_what_was_taken_where_several_places_speak(outrider: Any, tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=0)
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.6, "top_k": 20}')
    path = tmp_path / "config.json"
    scaling = {"rope_type": "linear", "factor": 2.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": scaling, "torch_dtype": "float16"}))
    code, out, _ = outrider("explain", str(tmp_path), "--json")
    facts = json.loads(out)["facts"]
    assert code == 0 and facts["end_of_text"]["taken"] == [0, 7, EOS]
    assert facts["end_of_text"]["said"]["tokenizer_config.json"] == [EOS]
    assert facts["sampling_defaults"]["taken"] == {"temperature": 0.6, "top_k": 20}
    assert facts["chat_template"]["taken"] is None
    assert facts["rope"]["taken"].startswith("linear") and "rope_parameters" in facts["rope"]["note"]
    assert facts["dtype"]["taken"] == "float32" and "torch_dtype" in facts["dtype"]["note"]
    code, out, _ = outrider("explain", str(tmp_path), "--generation-config", "none")
    assert code == 0 and "end of text [0, 7, 256]" in out and "generation_config.json: " in out
    assert "sampling defaults none" in out


def test_explain_shows_the_head(outrider: Any, tiny: Callable[..., Path]) -> None:
    model, head = str(tiny("qwen3")), tiny_head(True)
    code, out, _ = outrider("explain", model, "--draft", head, "-k", "3", "--json")
    told = json.loads(out)
    assert code == 0 and told["method"] == "peagle" and told["num_speculative_tokens"] == 3
    assert told["head"].items() >= {"directory": head, "layout": "speculators peagle", "parallel": True}.items()
    assert told["head"]["aux_layer_ids"] == TAPS and told["head"]["num_layers"] == 2
    share, plan = told["memory"]["drafter"], told["memory"]
    assert share["weights"] == sum(tensor.nbytes for tensor in head_tensors(True).values())
    assert 0 < share["cache"] < plan["cache"] and 0 < share["workspace"] < plan["workspace"]
    code, out, _ = outrider("explain", model, "--draft", head)
    assert code == 0 and "all in one pass" in out and head in out and "aux layer ids [0, 1, 2]" in out
    _, out, _ = outrider("explain", model, "--draft", tiny_head(False))
    assert "eagle3, 4 tokens a round, one after another" in out
    _, out, _ = outrider("explain", model, "--draft", "ngram", "--json")
    assert json.loads(out)["head"] is None and json.loads(out)["memory"]["drafter"] == dict.fromkeys(share, 0)


def test_generate_says_how_it_drafts(outrider: Any, tiny: Callable[..., Path]) -> None:
    asked = ["generate", str(tiny("qwen3")), "--prompt", "abc", *SHORT]
    _, out, _ = outrider(*asked, "--draft", tiny_head(False), "-k", "2", "--json")
    told = json.loads(out)
    assert (told["method"], told["num_speculative_tokens"], told["head"]["parallel"]) == ("eagle3", 2, False)
    _, out, _ = outrider(*asked, "--speculative-config", json.dumps({"model": tiny_head(True)}), "--json")
    assert (json.loads(out)["method"], json.loads(out)["head"]["parallel"]) == ("peagle", True)
    _, _, err = outrider(*asked, "--draft", tiny_head(True))
    assert "peagle, 4 tokens a round, all in one pass" in err
    _, out, _ = outrider(*asked, "--json")
    assert (json.loads(out)["method"], json.loads(out)["head"]) == ("ngram", None), "a model of one's own"


def test_the_bundled_model_drafts_with_its_own_head(outrider: Any) -> None:
    assert default_method(BUNDLED_MODEL) == "peagle"
    _, out, _ = outrider("generate", "--prompt", "import os\n", "--json", *SHORT)
    assert json.loads(out)["method"] == default_method(BUNDLED_MODEL)
    _, out, _ = outrider("explain", "-k", "3", "--json")
    assert json.loads(out)["method"] == default_method(BUNDLED_MODEL)
    _, out, _ = outrider("explain", "--json")
    assert json.loads(out)["method"] == default_method(BUNDLED_MODEL)
    _, out, _ = outrider("explain", "--draft", "none", "--json")
    assert json.loads(out)["method"] == "none"


@pytest.mark.parametrize(
    ("draft", "is_head"),
    [
        ("ngram", False),
        ("none", False),
        ("my_drafter:LastTime", False),
        ("ngrams", False),
        ("owner/name", True),
        ("./head", True),
        ("~/head", True),
        ("/no/such/head", True),
        ("tests", True),
    ],
)
def test_what_a_draft_names(draft: str, is_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert names_head(draft) == is_head
    key = "model" if is_head else "method"
    assert Drafting(draft=draft).config(None, True) == (None if draft == "none" else {key: draft})


def test_errors_are_json_too(outrider: Any) -> None:
    code, out, _ = outrider("explain", "/no/such/model", "--json")
    assert code == 2 and json.loads(out)["type"] == "CheckpointError"


def test_synthetic_acceptance_is_said_to_be_made_up(outrider: Any) -> None:
    made_up = ["--verifier", "synthetic", "--synthetic-rates", "1.0,0.8", "--synthetic-rates", "0.5"]
    _, out, err = outrider("generate", "--prompt", "import os\n", *made_up, *SHORT, "--json")
    assert json.loads(out)["faithful"] is False and "meaningless" in err
    _, _, err = outrider("bench", "latency", "--input-len", "8", "--output-len", "8", "--repeats", "1", *made_up)
    assert "meaningless" in err


def test_text_is_written_as_it_is(outrider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from outrider.cli import generate
    from outrider.engine.outputs import Piece

    pieces = [Piece(0, 1, "a\tb\r\n[bold]x", 0), Piece(0, 2, "c", 1)]
    for piece in pieces:
        generate._write(piece)
    _, out, _ = outrider("--version")
    assert out.startswith("a\tb\r\n[bold]xc")


def test_the_garbage_collector_runs_again_after_the_start() -> None:
    import gc

    frozen = gc.get_freeze_count()
    with pytest.raises(OptionError), common.starting():
        assert not gc.isenabled()
        raise OptionError("what a user got wrong")
    assert gc.isenabled() and gc.get_freeze_count() > frozen
    gc.unfreeze()


@pytest.mark.parametrize("speedup", [0.94, 1.0, 2.5])
def test_a_slow_down_is_called_one(speedup: float, outrider: Any) -> None:
    from outrider.cli import generate
    from outrider.core.output import AcceptanceReport

    report = AcceptanceReport(drafts=10, drafted=40, accepted=30, per_position=(10, 8, 7, 5))
    result = {"identical": True, "same_tokens_promised": True, "speedup": speedup, "verifier": "exact", "runner": "x"}
    speeds = {"with": 100 * speedup, "without": 100.0}
    generate._print_figures({**result, "tokens_per_second": speeds}, generate._Run("", [1], 1.0, report, "stop"), "x")
    _, _, err = outrider("--version")
    assert "accepted by position: 1 1.00  2 0.80  3 0.70  4 0.50" in err
    assert f"gives 4.00 tokens and takes as long as {4 / speedup:.2f} steps without" in err
    assert ("drafts are slower here" in err) == (speedup < 1)


def test_explain_refused_json(outrider: Any) -> None:
    code, out, _ = outrider("explain", "--tensor-parallel-size", "2", "--json")
    refused = json.loads(out)["refused"]
    assert code == 2
    split = [refusal for refusal in refused if refusal["feature"] == "tensor"]
    assert [refusal["runner"] for refusal in split] == ["graph", "eager"]
    assert all("leave it at 1" in refusal["reason"] for refusal in split)


def test_accept_json_and_record_and_departure(outrider: Any, tmp_path: Path) -> None:
    few = ["--num-prompts", "4", "--max-tokens", "48", "--json"]
    expectation = tmp_path / "acceptance.json"
    code, out, _ = outrider("accept", "--record", str(expectation), *few)
    result = json.loads(out)
    assert code == 0
    assert result.keys() >= {"drafts", "rates", "ratios", "acceptance_length", "expected", "passed", "departures"}
    code, out, _ = outrider("accept", "--expect", str(expectation), *few)
    assert code == 0 and json.loads(out)["passed"] is True
    recorded = json.loads(expectation.read_text())
    (only,) = recorded["records"]
    only["rates"], only["drafts"] = [min(1.0, rate + 0.5) for rate in only["rates"]], 100_000
    expectation.write_text(json.dumps(recorded))
    code, out, _ = outrider("accept", "--expect", str(expectation), *few)
    assert code == 1 and json.loads(out)["departures"]


def test_accept_refuses_an_expectation_of_another_run(outrider: Any, tmp_path: Path) -> None:
    expectation = tmp_path / "acceptance.json"
    outrider("accept", "--record", str(expectation), "--num-prompts", "2", "--max-tokens", "16", "--json")
    code, _, err = outrider(
        "accept", "--expect", str(expectation), "--num-prompts", "3", "--max-tokens", "16", "--json"
    )
    assert code == 2 and "prompts" in err


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_bench_json(outrider: Any, kind: str) -> None:
    concurrency = ["--concurrency", "1,3"] if kind == "throughput" else []
    code, out, _ = outrider(
        "bench", kind, "--input-len", "8", "--output-len", "8", "--repeats", "1", "--json", *concurrency
    )
    result = json.loads(out)
    assert code == 0
    assert result.keys() >= {"config", "command", "commit", "device", "versions", "rows"}
    for row in result["rows"]:
        assert row.keys() >= {
            "concurrency",
            "tokens_per_second",
            "step_ms",
            "parts_ms",
            "floor_ms",
            "acceptance_length",
            "steady_tokens_per_second",
            "host_ms",
            "floor_parts_ms",
            "floor_share",
        }
        assert row["steady_steps"] > 0 and row["parts_ms"].keys() == {"schedule", "run", "apply"}


def test_numbers_of_a_flag_may_stand_with_commas(outrider: Any) -> None:
    arguments = ("bench", "latency", "-k", "3", "--repeats", "1", "--output-len", "4", "--verifier", "synthetic")
    rates = ("--synthetic-rates", ".5,.25", "--synthetic-rates", ".125")
    _, out, _ = outrider(*arguments, *rates, "--json")
    assert json.loads(out)["config"]["synthetic_rates"] == [0.5, 0.25, 0.125]


def test_bench_prints_a_page(outrider: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = {"inputs": 0.01, "target": 0.6, "verify": 0.04, "draft": 0.25, "gap": 0.1}
    stats = WorkerStats(parts, {"seconds": 3.14, "bytes": 5 << 20}, 0)
    monkeypatch.setattr(Engine, "worker_stats", lambda engine: stats)
    written = tmp_path / "result.json"
    flags = ("--input-len", "8", "--output-len", "32", "--parts", "--output", str(written))
    code, out, _ = outrider("bench", "throughput", "-k", "3", "--concurrency", "1,2", *flags)
    assert code == 0
    for said in (
        "10.0%",
        "target",
        "0.600 ms",
        "60.0%",
        "draft head",
        "keys and values",
        "commit",
        "torch",
        "tokens/s",
        "recorded in 3.1 s, 5 MiB",
    ):
        assert said in out
    assert "…" not in out, "no figure is cut off where the output is no terminal"
    rows = json.loads(written.read_text())["rows"]
    assert [row["concurrency"] for row in rows] == [1, 2] and rows[0]["parts_ms"] == parts


def test_bench_prefill_and_kernels(outrider: Any) -> None:
    code, out, _ = outrider("bench", "prefill", "--num-prompts", "2", "--input-len", "32", "--repeats", "1", "--json")
    assert code == 0 and json.loads(out)["share_of_matmul"] > 0
    code, out, _ = outrider("bench", "prefill", "--num-prompts", "2", "--input-len", "32", "--repeats", "1")
    assert code == 0 and "share of that" in out
    asked = ("bench", "kernels", "--rows", "1,2", "--op", "rms_norm", "--context", "32", "--prefill", "0")
    code, out, _ = outrider(*asked, "--json")
    assert code == 0 and [row["rows"] for row in json.loads(out)["rows"]] == [1, 2]
    code, out, _ = outrider(*asked)
    assert code == 0 and "rms_norm" in out and "floor/kernel" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--prompt", ""], "empty"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["generate", "--prompt", "a", "--top-p", "nan"], "top_p"),
        (["generate", "--prompt", "a", "--min-tokens", "9", "--max-tokens", "3"], "min_tokens 9"),
        (["generate", "--prompt", "a", "-k", "1000"], "1000"),
        (["generate", "--prompt", "a", "--draft", "ngrams"], "did you mean ngram"),
        (["generate", "--prompt", "a", "--draft", "nowhere:Class"], "nowhere"),
        (["generate", "--prompt", "a", "--speculative-config", "{"], "not JSON"),
        (["explain", "--draft", "none", "--speculative-config", '{"method": "ngram"}'], "contradicts"),
        (["explain", "--draft", "/no/such/head"], "no model directory: /no/such/head"),
        (["explain", "--draft", "a/b", "--speculative-config", '{"model": "c/d"}'], "model a/b contradicts"),
        (["explain", "--draft", str(BUNDLED / "model")], "is not a draft head"),
        (["explain", "--draft", "TINY_HEAD"], "hidden size of 48, not 256"),
        (["explain", "--draft", "eagle3", "--speculative-config", '{"model": "TINY_HEAD"}'], "peagle"),
        (["accept", "--temperature", "-1"], "--temperature"),
        (["explain", "-k", "3", "--speculative-config", '{"num_speculative_tokens": 4}'], "contradicts"),
        (["explain", "--speculative-config", '{"method": "none", "num_speculative_tokens": 3}'], "drafts nothing"),
        (["explain", "--max-num-batched-tokens", "64"], "max_num_seqs 128"),
        (["explain", "--max-model-len", "1"], "max_model_len"),
        (["explain", "--verifier", "synthetic"], "synthetic_rates"),
        (["accept", "--record", "/"], "--record"),
        (["accept", "--expect", "/no/such/file"], "/no/such/file"),
        (["bench", "latency", "--input-len", "1500", "--output-len", "1500"], "3000"),
        (["generate", "/no/such/model", "--prompt", "a"], "/no/such/model"),
        (["generate", "--prompt", "a", "--dtype", "int3"], "int3"),
        (["generate", "--prompt", "a", "--max-model-len", "99999"], "99999"),
        (["generate", "--prompt", "a" * 20_000], "max_model_len"),
        (["explain", "--runner", "graf"], "graf"),
        (["explain", "--kv-cache-memory", "1000"], "kv_cache_memory"),
        (["accept", "--draft", "none"], "none"),
        (["bench", "throughput", "--concurrency", "1,x"], "1,x"),
        (["bench", "kernels", "--rows", "0"], "--rows"),
        (["bench", "kernels", "--device", "cuda:99"], "cuda:99"),
        (["bench", "kernels", "--dtype", "int3"], "int3"),
        (["bench", "latency", "--output-len", "2", "--repeats", "1", "--output", "/"], "--output"),
        (["explain", "--verifier", "synthetic", "--synthetic-rates", ".5,x"], "--synthetic-rates"),
        (["explain", "--no-such-flag"], "no-such-flag"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(outrider: Any, arguments: list[str], said: str) -> None:
    arguments = [argument.replace("TINY_HEAD", tiny_head(True)) for argument in arguments]
    code, _, err = outrider(*arguments)
    assert code == 2
    assert said in err.replace("\n", " ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("is_terminal", "arguments", "shows"),
    [(True, [], True), (False, [], False), (True, ["--log-format", "json"], False), (True, ["--json"], False)],
    ids=["terminal", "file", "log in json", "json"],
)
def test_serve_shows_bars_to_people_alone(
    is_terminal: bool,
    arguments: list[str],
    shows: bool,
    outrider: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, soft_wrap=True, width=100, force_terminal=is_terminal, force_interactive=is_terminal)
    monkeypatch.setattr(common, "err", console)
    monkeypatch.setattr(serve_command, "err", console)

    def serve(*given: Any) -> int:
        before = screen.getvalue()
        with given[-1]() as (loaded, recorded):
            assert (loaded is not None) == (recorded is not None) == shows
            if shows:
                loaded(3 * MIB, 7 * MIB)
                end = time.monotonic() + 10
                while "3/7 MiB" not in screen.getvalue():  # it is drawn ten times a second
                    assert time.monotonic() < end
                    time.sleep(0.02)
                recorded(2, 5)
        seen = screen.getvalue().removeprefix(before)
        for bar in (["loading weights", "3/7 MiB"], ["recording programs", "2/5"]):
            assert all(text in seen for text in bar) == shows
        assert shows or not seen
        assert seen.count("\x1b[1A") <= 1, "one line, and up only to erase it in the end"
        return 0

    monkeypatch.setattr(server, "serve", serve)
    assert outrider("serve", *arguments)[0] == 0
