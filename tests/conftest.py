"""Fixtures that several files share. Nothing here changes how outrider behaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before outrider is imported

import checkpoints

SERVING = ("fastapi", "httpx", "msgspec", "openai", "prometheus_client", "uvicorn", "zmq")
NEEDS: dict[str, tuple[str, ...]] = {
    "test_*_api.py": SERVING,
    "test_cli.py": SERVING,
    "test_clients.py": SERVING,
    "test_drafting_ended.py": SERVING,
    "test_explain.py": SERVING,
    "test_fuzz_requests.py": SERVING,
    "test_hints_and_round_trips.py": (*SERVING, "hypothesis"),
    "test_lossless.py": ("hypothesis",),
    "test_manners.py": (*SERVING, "trustme"),
    "test_playground.py": (*SERVING, "playwright"),
    "test_server.py": SERVING,
    "test_serving_scripts.py": (*SERVING, "hypothesis", "schemathesis"),
    "test_tracing.py": (*SERVING, "opentelemetry.sdk"),
    "unit/draft/test_ngram.py": ("hypothesis",),
    "unit/engine/test_detokenize.py": ("hypothesis",),
    "unit/engine/process/test_[ces]*.py": SERVING,
    "unit/engine/test_shared_use.py": SERVING,
    "unit/engine/test_special_stops.py": SERVING,
    "unit/engine/test_stops.py": ("hypothesis",),
    "unit/load/test_chat_template.py": SERVING,
    "unit/load/test_text_decoder.py": ("hypothesis",),
    "unit/load/test_token_bounds.py": ("hypothesis",),
    "unit/load/test_tokenizer.py": ("hypothesis",),
    "unit/models/test_config_fuzz.py": ("hypothesis",),
    "unit/server/test_*.py": (*SERVING, "hypothesis"),
    "unit/server/*/test_*.py": (*SERVING, "hypothesis"),
}
"""What files of tests need beyond outrider's own dependencies and pytest. A machine that runs the `gpu` tests need not
have it."""


def lacks(module: str) -> bool:
    """Whether it is not installed."""
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # nor what it is in
        return True


LACKING = {files: lacking for files, needs in NEEDS.items() if (lacking := [name for name in needs if lacks(name)])}
collect_ignore_glob = list(LACKING)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What is left out. A header would say so too, but not with -q."""
    for files, lacking in LACKING.items():
        terminalreporter.write_line(f"left out: tests/{files} ({', '.join(lacking)} not installed)")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own cache is not for tests; processes that tests start find this one too."""
    os.environ["OUTRIDER_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


TOGETHER = (
    "test_bundled.py",
    "test_chat_api.py",
    "test_examples.py",
    "test_manners.py",
    "test_playground.py",
    "test_responses_api.py",
    "test_server.py",
    "test_state_api.py",
    "test_tracing.py",
)
"""Files whose fixtures start servers or run many prompts: one worker runs the whole file, so it makes them once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Names the group of each such file to pytest-xdist, which `--dist loadgroup` keeps together."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.name in TOGETHER:
                item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_configure() -> None:
    """Workers of pytest-xdist share the cores: two teams of threads on the same ones wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def sound_drafters(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which a drafter fails, unless it is marked `failing_drafter`: drafting may not hide a bug."""
    with checkpoints.drafter_failures() as failures:
        yield
    if failures and request.node.get_closest_marker("failing_drafter") is None:
        pytest.fail("a drafter failed:\n" + "\n".join(failures))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **config)`: the directory of such a checkpoint with a tokenizer, written once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen3", **config: Any) -> Path:
        key = repr((family, sorted(config.items())))
        if key not in made:
            made[key] = checkpoints.write(tmp_path_factory.mktemp(family), family, **config)
            checkpoints.write_tokenizer(made[key])
        return made[key]

    return make


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`fake_gpu(capability, free, triton)`: from then on torch tells of one GPU. Nothing can be put on it."""

    def fake(capability: tuple[int, int] = (9, 0), free: int = 80 << 30, triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, free))
        monkeypatch.setattr("outrider.kernels.op.HAS_TRITON", triton)

    return fake
