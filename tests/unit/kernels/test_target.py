"""NUMBA_CPU_NAME: kernels for another processor than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

GENERATE = """
import torch
from outrider import LLM, SamplingParams
from outrider.kernels.cpu import amx
from outrider.kernels.cpu.jit import TARGET_FEATURES
from outrider.kernels.linear import LINEAR

halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
found = LINEAR.on("cpu")(torch.ones(1, 1), halves[:, None])[0]
same = (found == halves.float()) | (found.isnan() & halves.isnan())
outputs = LLM().generate(["def fibonacci(n):"], SamplingParams(temperature=0.0, max_tokens=12))
print([bool(same.all()), amx.AVAILABLE, "avx512f" in TARGET_FEATURES, list(outputs[0].outputs[0].token_ids)])
"""


def generated(**target: str) -> list[Any]:
    """Whether every float16 is widened exactly, whether the matrix unit is used, AVX-512 is known of, and tokens."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")} | target
    done = subprocess.run([sys.executable, "-c", GENERATE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = eval(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["generic", pytest.param("x86-64-v3", marks=pytest.mark.slow)])
def test_another_target_gives_the_same_tokens_without_this_processors_features(name: str) -> None:
    if name != "generic" and not os.uname().machine.startswith("x86"):
        pytest.skip("a name of x86 processors")
    exact, _, _, tokens = generated()
    assert exact and len(tokens) == 12
    assert generated(NUMBA_CPU_NAME=name) == [True, False, False, tokens]


def test_features_that_are_asked_for_are_known() -> None:
    script = "from outrider.kernels.cpu.jit import TARGET_FEATURES; print(*sorted(TARGET_FEATURES))"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx2,-avx512f,+fma"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["avx2", "fma"]
