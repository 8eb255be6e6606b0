"""What is read out of a config.json, in the spellings that are about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoints import parameters
from outrider.core.reading import Reader
from outrider.errors import CheckpointError
from outrider.layers.parameter import Allocator
from outrider.layers.rope import Rope
from outrider.layers.rope_scaling import LinearScaling, Llama3Scaling
from outrider.models.config import ModelConfig
from outrider.models.registry import MODELS, find_model, read_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
CPU = torch.device("cpu")


@pytest.fixture
def config(tiny: Callable[..., Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny("qwen3") / "config.json").read_text())
    return loaded


def test_sizes(config: dict[str, Any]) -> None:
    read = ModelConfig.from_dict(config)
    assert (read.architecture, read.vocab_size, read.hidden_size) == ("Qwen3ForCausalLM", 260, 48)
    assert (read.num_layers, read.num_heads, read.num_kv_heads, read.head_dim) == (2, 4, 2, 16)
    assert (read.intermediate_size, read.max_position_embeddings, read.dtype) == (80, 256, torch.float32)


def test_what_may_be_left_out(config: dict[str, Any]) -> None:
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters", "dtype", "eos_token_id"):
        config.pop(key, None)
    read = ModelConfig.from_dict(config)
    assert (read.num_kv_heads, read.head_dim, read.tie_word_embeddings) == (4, 12, False)
    assert (read.rope, read.dtype, read.eos_token_ids) == (Rope(), torch.float32, ())


def test_what_a_family_has_where_a_config_says_nothing_is_transformers(config: dict[str, Any]) -> None:
    heads = {"num_attention_heads": 64, "hidden_size": 128}
    for architecture, make in (("Qwen3ForCausalLM", Qwen3Config), ("LlamaForCausalLM", LlamaConfig)):
        kept = {**config, **heads, "architectures": [architecture]}
        for key in ("num_key_value_heads", "head_dim"):
            del kept[key]
        _, read = read_config(kept)
        theirs = make(**heads)
        assert (read.num_kv_heads, read.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
        kept |= {"num_key_value_heads": None, "head_dim": None}
        assert (read_config(kept)[1].num_kv_heads, read_config(kept)[1].head_dim) == (64, 2), "null is said"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_both_spellings_of_the_dtype(config: dict[str, Any], key: str, value: str) -> None:
    del config["dtype"]
    assert ModelConfig.from_dict({**config, key: value}).dtype is torch.bfloat16


def test_end_of_text() -> None:
    assert [Reader({"eos_token_id": value}).token_ids("eos_token_id") for value in (None, 0, [3, 4])] == [
        (),
        (0,),
        (3, 4),
    ]


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_both_spellings_of_rope(kind: str) -> None:
    expected = Rope(5e5, Llama3Scaling(**LLAMA3))
    assert Rope.from_config({"rope_theta": 5e5, "rope_scaling": {kind: "llama3", **LLAMA3}}) == expected
    assert Rope.from_config({"rope_parameters": {"rope_theta": 5e5, kind: "llama3", **LLAMA3}}) == expected
    assert Rope.from_config({"rope_theta": 7.0, "rope_scaling": {kind: "linear", "factor": 2}}) == Rope(
        7.0, LinearScaling(2)
    )
    assert Rope.from_config({"rope_theta": 7.0, "rope_scaling": None}) == Rope(7.0)


@pytest.mark.parametrize("parameters", [{"rope_type": "llama3", **LLAMA3}, {"rope_type": "linear", "factor": 3.0}, {}])
def test_rope_frequencies_are_those_of_transformers(parameters: dict[str, Any]) -> None:
    given = {"rope_theta": 5e5, "rope_type": "default", **parameters}
    size, length = 64, 300
    table = Rope.from_config({"rope_parameters": given}).table(length, size, CPU)
    assert table.shape == (length, size) and table.dtype == torch.float32
    if parameters:
        llama = LlamaConfig(head_dim=size, max_position_embeddings=1024, rope_parameters=given)
        frequency, scale = ROPE_INIT_FUNCTIONS[given["rope_type"]](llama, CPU)
        assert scale == 1.0
    else:
        frequency = 5e5 ** -(torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(length).float(), frequency)
    # an angle of 300 radians is rounded to 3e-5
    torch.testing.assert_close(table, torch.cat((angle.cos(), angle.sin()), -1), atol=1e-4, rtol=0)


def test_rope_scalings_change_what_they_should() -> None:
    frequency = torch.tensor([1.0, 2 * math.pi / 100])  # wavelengths of 6 and of 100 tokens
    scaled = Llama3Scaling(**LLAMA3).scale(frequency)
    assert scaled.tolist() == pytest.approx([1.0, 2 * math.pi / 800])
    assert LinearScaling(4.0).frequencies(100.0, 4, 8).tolist() == pytest.approx([0.25, 0.025])


@pytest.mark.parametrize("architecture", MODELS)
def test_every_parameter_has_one_name(architecture: str, config: dict[str, Any]) -> None:
    read = ModelConfig.from_dict({**config, "architectures": [architecture]})
    model = find_model(architecture)(read, 32, Allocator.on(CPU, torch.float32))
    weights = parameters(model)
    for weight in weights.values():
        assert weight.isnan().all(), "NaN until it is loaded"
        weight.zero_()
    for owner in (model.embedding, model.norm, model.head, *model.layers):
        assert not any(slot.tensor.isnan().any() for slot in owner.slots("").values())  # type: ignore[attr-defined]
    assert ("model.layers.0.self_attn.q_norm.weight" in weights) == (architecture == "Qwen3ForCausalLM")
    layout = model.cache_layout(16)
    assert layout.bytes_per_block == 2 * 2 * 2 * 16 * 16 * 4
    assert sum(cache.key.nbytes + cache.value.nbytes for cache in layout.allocate(3, CPU)) == 3 * layout.bytes_per_block


NAN, INF = math.nan, math.inf
ROTATED = ("linear", "dynamic", "yarn", "llama3", "longrope")
WRONG: list[tuple[str, dict[str, Any]]] = [
    *(("rms_norm_eps", {"rms_norm_eps": value}) for value in (-1, -1e-9, NAN, INF, 1e30, "1e-6", True)),
    *(("head_dim", {"head_dim": value}) for value in (0, -2, 15, 1.5, "16", 2**40)),
    *(("num_attention_heads", {"num_attention_heads": value}) for value in (0, -4, 4.0)),
    *(("num_key_value_heads", {"num_key_value_heads": value}) for value in (0, 3, 8, -1)),
    *(("vocab_size", {"vocab_size": value}) for value in (0, -1, 2**40)),
    *(("intermediate_size", {"intermediate_size": value}) for value in (0, -80)),
    *(("num_hidden_layers", {"num_hidden_layers": value}) for value in (0, -1, 10**9)),
    *(("max_position_embeddings", {"max_position_embeddings": value}) for value in (0, -1, 2**45)),
    *(("tie_word_embeddings", {"tie_word_embeddings": value}) for value in ("false", 0, 1, [])),
    *(("attention_bias", {"attention_bias": value}) for value in ("yes", 1)),
    *(("partial_rotary_factor", {"partial_rotary_factor": value}) for value in (0.5, 0, -1, NAN)),
    *(("dtype", {"dtype": value}) for value in ("int8", "float8_e4m3fn", "", 16, {"a": 1})),
    *(("quantised", {"quantization_config": value}) for value in ({"quant_method": "fp8"}, "x", {"bits": 4})),
    *(
        ("sliding-window", value)
        for value in ({"use_sliding_window": True}, {"layer_types": ["sliding_attention"] * 2})
    ),
    *(("rope_theta", {"rope_theta": value, "rope_parameters": None}) for value in (0, -1, 0.5, NAN, INF)),
    *(("rope_theta", {"rope_parameters": {"rope_theta": value}}) for value in (0, -1, NAN)),
    *(
        ("rope", {"rope_scaling": {**LLAMA3, **LONG, "rope_type": kind, "factor": factor}})
        for kind in ROTATED
        for factor in (0, -1, NAN, INF, "2")
    ),
    *(
        ("rope", {"rope_scaling": {**LLAMA3, "rope_type": kind, "factor": factor}})
        for kind in ("linear", "yarn", "llama3")
        for factor in (1e-320, 1e-40)
    ),
    (
        "rope",
        {"rope_scaling": {**LONG, "rope_type": "longrope", "short_factor": [1e-45] * 8, "long_factor": [1e-45] * 8}},
    ),
    *(
        ("attention_factor", {"rope_scaling": {**LONG, "rope_type": kind, "factor": 2.0, "attention_factor": value}})
        for kind in ("yarn", "longrope")
        for value in (0, -1.0, NAN, INF)
    ),
]


@pytest.mark.parametrize(("named", "wrong"), WRONG, ids=lambda value: value if isinstance(value, str) else str(value))
def test_a_value_that_can_never_be_right_is_refused(config: dict[str, Any], named: str, wrong: dict[str, Any]) -> None:
    """The message has its key and its value, and comes before any weight is read."""
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_dict({**config, **wrong})


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu_", "x" * 10_000])
def test_an_activation_that_the_family_does_not_have(config: dict[str, Any], activation: str) -> None:
    read = ModelConfig.from_dict({**config, "hidden_act": activation})
    with pytest.raises(CheckpointError, match=r"hidden_act is not supported: .{1,90}known: silu"):
        find_model(read.architecture).mlp(read)


def test_values_that_nothing_reads_do_no_harm(config: dict[str, Any]) -> None:
    """As in transformers: how weights were drawn, a window that is off, another name of silu."""
    unread = {
        "initializer_range": NAN,
        "sliding_window": 4,
        "use_sliding_window": False,
        "max_window_layers": 0,
        "attention_dropout": 0.1,
    }
    read = ModelConfig.from_dict({**config, **unread, "hidden_act": "swish"})
    assert find_model(read.architecture).mlp(read) == find_model(read.architecture).mlp(ModelConfig.from_dict(config))
    assert ModelConfig.from_dict({**config, **unread}) == ModelConfig.from_dict(config)
