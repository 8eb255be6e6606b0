"""Whatever a checkpoint's JSON holds, it is read or refused by a CheckpointError that names the value."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import write_tokenizer
from outrider.config import resolve
from outrider.errors import CapacityError, CheckpointError
from outrider.models.config import ModelConfig
from outrider.models.registry import find_model
from outrider.options import EngineOptions

DEVICE = torch.device("cpu")

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 16, 1.5, -1.5, 1e300, float("nan"), float("inf"), 10**30, 2**31, 2**45),
    *("", "x", "1", "auto", "float32", "torch.bfloat16", "yarn", "default", "LlamaForCausalLM", "\ud800"),
    *([], [1], [0, 1], [1.5], ["x"], [["x"]], [None], {}, {"a": 1}, {"full_attention": {}}, [[[[]]]]),
]
ROPE_KEYS = [
    *("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "attention_factor", "mscale"),
    *("mscale_all_dim", "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor", "short_factor"),
    *("long_factor", "partial_rotary_factor"),
]
KINDS = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", ["linear"], "x"]
KEYS = [
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "dtype", "torch_dtype"),
    *("eos_token_id", "layer_types", "use_sliding_window", "partial_rotary_factor", "quantization_config"),
]

GENERATION_KEYS = ["eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]


def ropes() -> st.SearchStrategy[dict[str, Any]]:
    keys = st.dictionaries(st.sampled_from(ROPE_KEYS), st.sampled_from(VALUES), max_size=5)
    return st.tuples(st.sampled_from(KINDS), keys).map(lambda pair: {"rope_type": pair[0], "factor": 2.0, **pair[1]})


def changes() -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(KEYS), st.one_of(st.sampled_from(VALUES), ropes()), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def config(tiny: Callable[..., Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny("qwen3") / "config.json").read_text())
    return loaded


def read(config: dict[str, Any], changed: dict[str, Any]) -> bool:
    """Whether it can be read. Any error but a CheckpointError is a fault."""
    try:
        made = ModelConfig.from_dict({**config, **changed})
        find_model(made.architecture).layer_specs(made)
        assert made.rope.table(40, min(made.head_dim, 4096), DEVICE).isfinite().all(), made.rope
    except CheckpointError as error:
        assert str(error).strip() and len(str(error)) < 600
        return False
    return True


FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def read_many(config: dict[str, Any], count: int) -> None:
    """So many random configs, of which some are read and some refused."""
    outcomes: Counter[bool] = Counter()

    @settings(FUZZ, max_examples=count)
    @given(changed=changes())
    def read_one(changed: dict[str, Any]) -> None:
        outcomes[read(config, changed)] += 1

    read_one()
    assert outcomes[True] > count // 20 and outcomes[False] > count // 4, outcomes


def test_random_configs(config: dict[str, Any]) -> None:
    read_many(config, 400)


@pytest.mark.slow
def test_many_random_configs(config: dict[str, Any]) -> None:
    read_many(config, 20_000)


@settings(FUZZ, max_examples=60)
@given(
    changed=changes(),
    generation=st.dictionaries(st.sampled_from(GENERATION_KEYS), st.sampled_from(VALUES), max_size=2),
)
def test_random_checkpoints_are_resolved_or_refused(
    config: dict[str, Any],
    changed: dict[str, Any],
    generation: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config, **changed}))
    (path / "generation_config.json").write_text(json.dumps(generation))
    try:
        resolve(EngineOptions(model=str(path), load_format="dummy", device="cpu", kv_cache_memory=1 << 26))
    except (CheckpointError, CapacityError) as error:
        assert str(error).strip()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architectures": ({"architectures": [["x"]]}, r"architectures must be a list of texts: \[\['x'\]\]"),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps must be a number of at least 0: -1"),
    "end of text": ({"eos_token_id": 1.5}, "eos_token_id must be token ids.*: 1.5"),
    "positions": ({"max_position_embeddings": 2**45}, "max_position_embeddings must be .* 16777216: 35184372088832"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 4096"),
    "digits": ({"vocab_size": 10**5000}, "vocab_size must be .*: int, too large to be written here"),
    "tied": ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false: 'false'"),
    "layer types": ({"layer_types": 5}, "layer_types must be a list of texts: 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_value_and_remedy(config: dict[str, Any], name: str) -> None:
    changed, message = BAD[name]
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**config, **changed})


UNREADABLE = {
    "lists": "[" * 200_000 + "]" * 200_000,
    "objects": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "digits": '{"a":' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("text", UNREADABLE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_python_cannot_hold(tiny: Callable[..., Path], tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "config.json").write_text((tiny("qwen3") / "config.json").read_text())
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(UNREADABLE[text])
    with pytest.raises(CheckpointError, match="cannot read"):
        resolve(EngineOptions(model=str(tmp_path), load_format="dummy"))
