"""Sampling parameters as callers write them. What is refused stands in `test_faults.py`."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from outrider.core.sampling import NOT_OFFERED, SamplingParams
from outrider.errors import SamplingError


def test_copies_are_equal() -> None:
    made = SamplingParams(n=2, temperature=0.5, stop="a", stop_token_ids=[3], seed=7)
    for same in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made), replace(made)):
        assert same == made
    assert replace(made, n=3).n == 3
    with pytest.raises(SamplingError, match="did you mean seed"):
        replace(made, sed=3)  # type: ignore[call-arg]


def test_the_signature_names_the_fields() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == [entry.name for entry in fields(SamplingParams)]


@pytest.mark.parametrize("name", sorted(NOT_OFFERED))
def test_fields_that_are_not_offered_are_no_fields(name: str) -> None:
    assert name not in {entry.name for entry in fields(SamplingParams)}
    with pytest.raises(SamplingError, match=f"{name} is not offered yet"):
        SamplingParams(**{name: 1})


def test_unset_as_vllm_writes_it() -> None:
    assert SamplingParams(seed=-1, top_k=-1) == SamplingParams(seed=None, top_k=0)


def test_what_other_servers_take() -> None:
    """A top_p of 0 keeps one token, as in llama.cpp; a negative seed is a seed, as in vLLM."""
    assert SamplingParams(top_p=0) == SamplingParams(top_k=1) != SamplingParams()
    assert SamplingParams(top_p=0.0, top_k=40).top_k == 1
    seeds = [SamplingParams(seed=seed).seed for seed in (-2, -3, -(2**63), 0)]
    assert seeds == [2**63 - 2, 2**63 - 3, 0, 0]
    assert SamplingParams(seed=-2, n=3).of_completion(2).seed == 0


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_whole_numbers_of_numpy_s(kind: Any) -> None:
    names = ("n", "top_k", "seed", "max_tokens", "min_tokens")
    made = SamplingParams(**{name: kind(3) for name in names}, stop_token_ids=np.array([4, 5], dtype=kind))
    assert made == SamplingParams(**dict.fromkeys(names, 3), stop_token_ids=(4, 5))
    assert all(type(value) is int for value in (*(getattr(made, name) for name in names), *made.stop_token_ids))


def test_numbers_of_numpy_s() -> None:
    made = SamplingParams(temperature=np.float32(0.5), top_p=np.float64(0.25), min_p=0)  # type: ignore[arg-type]
    assert (made.temperature, made.top_p, made.min_p) == (0.5, 0.25, 0.0)
    assert type(made.temperature) is float
    with pytest.raises(SamplingError, match="top_k"):
        SamplingParams(top_k=np.float32(3))  # type: ignore[arg-type]


def test_stops_in_any_form() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",) == SamplingParams(stop=iter(["ab"])).stop  # type: ignore[arg-type]
    assert SamplingParams().stop == SamplingParams().stop_token_ids == ()


@pytest.mark.parametrize("value", [10**30, 10**5000, 2**63], ids=["30 digits", "5000 digits", "2**63"])
@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "n", "seed", "top_k"])
def test_a_number_that_is_too_large_is_called_that(name: str, value: int) -> None:
    with pytest.raises(SamplingError, match=f"{name} is too large: .*; give less than"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "given", [{"temperature": 10**5000}, {"stop_token_ids": [-(10**5000)]}, {"max_tokens": -(10**5000)}]
)
def test_a_number_that_python_does_not_write_is_refused_all_the_same(given: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match="too large to be written here"):
        SamplingParams(**given)
