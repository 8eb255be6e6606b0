"""Tables of rotary embedding are those of transformers, for every scaling and spelling."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import test_parity_hf as parity
from checkpoints import prompt, reference, write
from outrider import LLM
from outrider.errors import CheckpointError, OptionError
from outrider.layers.rope import Rope
from outrider.layers.rope_scaling import SCALINGS
from outrider.models.config import ModelConfig

CPU = torch.device("cpu")
HEAD_DIM, LENGTH = 32, 128  # of the model; scalings stretch the length
SHORT, LONG = [1.0 + 0.1 * pair for pair in range(16)], [1.0 + 3.0 * pair for pair in range(16)]

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH},
    "yarn of the model's length": {"rope_type": "yarn", "factor": 3.0},
    "yarn below 1": {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64},
    "yarn by its factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn with mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn with one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "yarn of other turns": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn with a truncate of null": {"rope_type": "yarn", "factor": 4.0, "truncate": None},
    "yarn of one turn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 1, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": LENGTH,
    },
    "longrope by lengths": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": LENGTH // 4,
    },
    "default": {"rope_type": "default"},
}
FAMILIES = {"llama": (LlamaConfig, LlamaRotaryEmbedding), "qwen3": (Qwen3Config, Qwen3RotaryEmbedding)}


def _config(**given: Any) -> dict[str, Any]:
    return {"head_dim": HEAD_DIM, "max_position_embeddings": LENGTH, "rope_theta": 5e5, **given}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [LENGTH // 4, LENGTH, 3 * LENGTH])
@pytest.mark.parametrize("name", SCALED)
def test_tables_are_those_of_transformers(name: str, length: int, family: str, spelling: str) -> None:
    make_config, make_embedding = FAMILIES[family]
    given = _config(**{spelling: dict(SCALED[name])})
    embedding = make_embedding(make_config(**json.loads(json.dumps(given))))
    cos, sin = embedding(torch.empty(1), torch.arange(length)[None])
    table = Rope.from_config(given).table(length, HEAD_DIM, CPU)
    expected = torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)
    # an angle of 400 radians is rounded to 3e-5
    torch.testing.assert_close(table, expected, atol=1e-4, rtol=0)


def test_scalings_differ_from_none() -> None:
    # else the comparison above could not fail
    plain = Rope(5e5).table(3 * LENGTH, HEAD_DIM, CPU)
    for name in set(SCALED) - {"default"}:
        scaled = Rope.from_config(_config(rope_scaling=SCALED[name])).table(3 * LENGTH, HEAD_DIM, CPU)
        assert (scaled - plain).abs().max() > 0.05, name


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TWICE: dict[str, dict[str, Any]] = {
    "a card's yarn beside saved parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": YARN,
    },
    "with a theta of its own": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {**YARN, "rope_theta": 700.0},
    },
    "with a theta beside it": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": YARN,
        "rope_theta": 900.0,
    },
    "linear": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "an empty one": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {}},
    "two thetas": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 900.0},
    "two types": {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 3.0}},
    "a length outside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("name", TWICE)
def test_of_two_places_transformers_precedence_is_taken_and_said(name: str) -> None:
    given = {"head_dim": HEAD_DIM, "max_position_embeddings": LENGTH, **TWICE[name]}
    embedding = Qwen3RotaryEmbedding(Qwen3Config(**json.loads(json.dumps(given))))
    cos, sin = embedding(torch.empty(1), torch.arange(100)[None])
    rope = Rope.from_config(given)
    expected = torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)
    torch.testing.assert_close(rope.table(100, HEAD_DIM, CPU), expected, atol=1e-4, rtol=0)
    assert rope.fact is not None
    assert (rope.fact.note is None) == (name in ("an empty one", "a length outside")), rope.fact


def test_a_key_that_nothing_reads_is_said() -> None:
    fact = Rope.from_config(_config(rope_scaling={**YARN, "orignal_max_position_embeddings": 3})).fact
    assert fact is not None and "orignal_max_position_embeddings" in str(fact.note)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [YARN, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.5}, {"rope_type": "linear", "factor": 2.0}, SCALED["dynamic"]],
    ids=["yarn", "mscale", "linear", "dynamic"],
)
def test_logits_of_a_checkpoint_that_names_a_scaling_twice(
    tmp_path: Path, family: str, scaling: dict[str, Any]
) -> None:
    write(tmp_path, family, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": scaling}))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == scaling["rope_type"]
    model = reference(tmp_path, family)
    texts = [prompt(20), prompt(60)]  # below and above the 32 positions of the training
    llm, recorder = parity.serve(tmp_path)
    whole = parity.complete(llm, texts)
    parity.check(model, recorder, texts, whole)
    if scaling["rope_type"] != "dynamic":  # which changes nothing within the model's positions
        llm, recorder = parity.serve(tmp_path, parity.drop_rope_scaling)
        whole = parity.complete(llm, texts)
        with pytest.raises(AssertionError, match="are off by"):
            parity.check(model, recorder, texts, whole)


RANDOM_VALUES: dict[str, list[Any]] = {
    "factor": [1.0, 2, 2.5, 4.0, 8, None],
    "rope_theta": [1e4, 5e5, 1e6, 100.0],
    "original_max_position_embeddings": [16, 64, 128],
    "attention_factor": [1.0, 0.8, 1.3, None],
    "mscale": [0.7, 1.0, 0, None],
    "mscale_all_dim": [0.7, 1.0, 0, None],
    "beta_fast": [32, 16, 64.0, None],
    "beta_slow": [1, 2, None],
    "truncate": [True, False],
    "low_freq_factor": [1.0, 2.0],
    "high_freq_factor": [4.0, 3.0],
    "short_factor": [SHORT],
    "long_factor": [LONG],
}


def random_rope(rng: random.Random) -> dict[str, Any] | None:
    """What a config may say in one of the two places."""
    kind = rng.choice(list(SCALINGS))
    keys = SCALINGS[kind].READS if SCALINGS[kind] is not None else ()  # type: ignore[union-attr]
    made = {rng.choice(["rope_type", "rope_type", "type"]): kind}
    made |= {key: rng.choice(RANDOM_VALUES[key]) for key in (*keys, "rope_theta") if rng.random() < 0.7}
    return rng.choice([made, made, made, {}, None])


def compare_random_configs(seed: int, count: int) -> int:
    """How many both read, of so many; whatever both read is the same. Only what is refused may differ."""
    rng, num_read = random.Random(seed), 0
    for _ in range(count):
        given: dict[str, Any] = {"head_dim": HEAD_DIM, "max_position_embeddings": rng.choice([64, 128, 256])}
        given |= {key: rng.choice(RANDOM_VALUES[key]) for key in ("rope_theta",) if rng.random() < 0.6}
        given |= {key: random_rope(rng) for key in ("rope_scaling", "rope_parameters") if rng.random() < 0.7}
        given |= {key: rng.choice([16, 64]) for key in ("original_max_position_embeddings",) if rng.random() < 0.15}
        make_config, make_embedding = FAMILIES[rng.choice(list(FAMILIES))]
        length = rng.choice([12, 64, 256])
        try:
            table = Rope.from_config(given).table(length, HEAD_DIM, CPU)
        except CheckpointError:
            continue
        embedding = make_embedding(make_config(**json.loads(json.dumps(given))))
        cos, sin = embedding(torch.empty(1), torch.arange(length)[None])
        expected = torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)
        torch.testing.assert_close(table, expected, atol=2e-4, rtol=0, msg=lambda told, of=given: f"{told}\n{of}")
        num_read += 1
    return num_read


def test_random_configs_are_read_as_transformers_reads_them() -> None:
    assert compare_random_configs(1, 200) > 100


@pytest.mark.slow
def test_many_random_configs_are_read_as_transformers_reads_them() -> None:
    assert compare_random_configs(2, 20_000) > 10_000


def test_positions_that_a_scaling_makes(tmp_path: Path) -> None:
    write(tmp_path, rope_parameters={"rope_theta": 1e4, **YARN, "factor": 16.0})
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.resolved.runner.sizes.max_model_len == 512, "16 times 32, and not the config's 256"
    write(tmp_path, rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0})
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.resolved.runner.sizes.max_model_len == 256
    with LLM(str(tmp_path), max_model_len=500) as llm:
        assert llm.engine.resolved.runner.sizes.max_model_len == 500
    with pytest.raises(OptionError, match="at most 512"):
        LLM(str(tmp_path), max_model_len=513)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "theta 0": ({"rope_theta": 0}, "rope_theta must be .*: 0"),
    "theta nan": ({"rope_theta": float("nan")}, "rope_theta must be a number"),
    "theta of 400 digits": ({"rope_theta": 10**400}, "rope_theta must be a number"),
    "a kind that is a list": ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type must be text"),
    "an unknown kind": ({"rope_scaling": {"rope_type": "linaer"}}, "did you mean linear"),
    "no object": ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    "no factor": ({"rope_scaling": {"rope_type": "yarn"}}, "lacks rope_scaling.factor"),
    "factor 0": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a number above 0"),
    "factor text": ({"rope_parameters": {"rope_type": "dynamic", "factor": "4"}}, "factor must be a number"),
    "yarn of theta 1": ({"rope_theta": 1, "rope_scaling": YARN}, "yarn needs a rope_theta above 1"),
    "negative turns": ({"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast must be a number"),
    "one list short": ({"rope_scaling": {**SCALED["longrope"], "long_factor": [1.0]}}, "long_factor must hold 16"),
    "no list": ({"rope_scaling": {**SCALED["longrope"], "short_factor": 1.0}}, "short_factor must be a list"),
    "low above high": ({"rope_scaling": {**SCALED["llama3"], "low_freq_factor": 5.0}}, "high_freq_factor must be"),
    "a rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention gives a kind of layer its own rope",
    ),
    "a part of each head": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "dynamic past all numbers": ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e300}}, "no finite angles"),
    "too many positions": ({"rope_scaling": {**YARN, "factor": 1e9}}, "makes 32000000000 positions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_rope_is_refused(name: str) -> None:
    given, message = WRONG[name]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 9, **sizes, **_config(**given)}
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(config)
