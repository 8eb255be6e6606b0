"""The README, the docs and the examples do what they say."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from outrider.bench.prompts import EDITS, HELD_OUT, read_prompts
from outrider.cli.main import app
from servers import Server, serving

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SERVED = "http://localhost:8000"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "examples")]),
    "COLUMNS": "200",
}


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def commands() -> list[str]:
    """Every `outrider ...` line of the documents' shell blocks."""
    lines = [line for document in DOCUMENTS for block in blocks(document, "sh") for line in block.splitlines()]
    plain = [re.sub(r"^(\w+=\S+ )+", "", line.split("  #")[0]).strip() for line in lines]
    return sorted({line for line in plain if line.startswith("outrider ") and not line.startswith("outrider serve")})


@pytest.mark.parametrize(
    "command",
    [
        # without --num-prompts it runs the whole held-out set, as test_bundled does
        pytest.param(one, marks=[pytest.mark.slow] * (" accept " in one and "--num-prompts" not in one))
        for one in commands()
    ],
)
def test_documented_command_runs(command: str) -> None:
    arguments = shlex.split(command)[1:]
    if any(argument.startswith("Qwen/") for argument in arguments):
        pytest.skip("needs the hub")
    done = subprocess.run(
        [sys.executable, "-m", "outrider", *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("served") / "log") as server:
        yield server


def requests() -> list[str]:
    """Every curl line of the documents that asks a server of ours."""
    lines = [line for document in DOCUMENTS for block in blocks(document, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("curl ") and SERVED in line]


@pytest.mark.parametrize("command", requests())
def test_documented_request_is_answered(command: str, server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    arguments = shlex.split(command.replace(SERVED, server.url))
    done = subprocess.run([*arguments, "-sS", "--fail-with-body"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr


def test_documented_clients_are_answered(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    clients = [block for document in DOCUMENTS for block in blocks(document, "python") if SERVED in block]
    assert clients
    for block in clients:
        exec(compile(block.replace(SERVED, server.url), "client", "exec"), {"__name__": "example"})
        assert capsys.readouterr().out.strip()


def test_reference_pages_are_what_a_server_answers(server: Server) -> None:
    if torch.cuda.is_available():
        pytest.skip("the pages show what a CPU answers")
    sys.path.insert(0, str(ROOT / "tools"))
    import write_reference as reference

    for name, text in reference.pages_of_server(server.url).items():
        assert (ROOT / "docs" / "reference" / name).read_text() == text, f"write {name} again: make reference"


def test_documents_hold_commands_at_all() -> None:
    assert len(commands()) >= 4


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_python_runs(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for block in blocks(document, "python"):
        if SERVED in block:
            continue
        exec(compile(block, str(document), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("name", ["offline", "parity_with_transformers"])
def test_example_runs(name: str) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def test_demo_commands_parse() -> None:
    """The demo itself is a README command; here its commands are held against today's flags."""
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    group = typer.main.get_command(app)
    for command in demo["COMMANDS"]:
        subcommand = group.commands[command[0]]  # type: ignore[attr-defined]
        subcommand.make_context(command[0], [*command[1:], "-k", "2"])


@pytest.mark.parametrize(
    ("speeds", "taken", "pays"),
    [
        ({0: 100.0, 2: 150.0, 7: 120.0}, 2, True),
        ({0: 100.0, 2: 99.0, 7: 60.0}, 2, False),
        ({0: 100.0, 2: 90.0, 7: 100.0}, 7, False),
    ],
)
def test_the_demo_takes_the_fastest_k_and_says_if_none_pays(
    speeds: dict[int, float], taken: int, pays: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    assert demo["choose"](speeds) == taken
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "taken" in line)
    assert f"K = {taken} " in line and f"{speeds[taken] / 100:.2f}x" in line
    assert ("do not pay" not in shown) == pays and "\x1b" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def made_for_a_gpu() -> list[list[str]]:
    """The commands of `make gpu`, as words behind the Python that runs them."""
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    command = ["make", "--dry-run", "--no-print-directory", "gpu", "PYTHON=python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [shlex.split(line)[1:] for line in done.stdout.replace("\\\n", "").splitlines()]


def test_make_gpu_runs_the_tests_and_benches_that_parse() -> None:
    tests, *benches, mixed = made_for_a_gpu()
    assert tests == ["-m", "pytest", "-m", "gpu"] and mixed[0] == "benchmarks/mixed_steps.py"
    group = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    for words in benches:
        assert words[:3] == ["-m", "outrider.cli.main", "bench"]
        context = group.commands[words[3]].make_context(words[3], words[4:])
        assert context.params["device"] == "cuda" and (ROOT / context.params["model"] / "config.json").exists()
    assert [words[3] for words in benches] == ["latency", "kernels"]


def test_make_gpu_measures_prompts_beside_decodes() -> None:
    """As it does, but on a tiny model and a CPU."""
    words = made_for_a_gpu()[-1]
    small = ["--model", "tiny", "--device", "cpu", "--prompt-len", "64", "--json"]
    done = subprocess.run(
        [sys.executable, *words, *small], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["before_ms"]["count"] == 8 * 20, "requests and steps of one round"


def test_bundled_prompt_sets_are_large_enough() -> None:
    assert len(read_prompts(HELD_OUT).texts) >= 200
    assert len(read_prompts(EDITS).texts) >= 48
