"""A head's config.json with values of any type is a head, somebody else's, or a CheckpointError."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from heads import tiny_head
from outrider.draft.eagle.checkpoint import read_head
from outrider.errors import CheckpointError
from outrider.load.checkpoint import Checkpoint

VALUES: tuple[Any, ...] = (None, True, 0, -1, 5, 1.5, 2**45, "", "x", "7", [], ["x"], [["x"]], [3], {}, {"x": 1})


@pytest.fixture(params=[True, False], ids=["peagle", "eagle3"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_head(request.param), tmp_path / "head"))


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with a value of the config, or of an object in it, replaced."""
    config = json.loads(json.dumps(config))
    inner = [config, *(value for value in config.values() if isinstance(value, dict))]
    chosen = rng.choice(inner)
    chosen[rng.choice(sorted(chosen))] = rng.choice(VALUES)
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", 5),
        ("architectures", [["x"]]),
        ("speculators_model_type", ["x"]),
        ("norm_before_residual", "false"),
        ("norm_output", 0),
        ("eagle_aux_hidden_state_layer_ids", [True, 2, 3]),
    ],
)
def test_a_value_of_another_type_is_named(head: Path, key: str, value: Any) -> None:
    path = head / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=key):
        read_head(Checkpoint.open(head))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rms_norm_eps": -1},
        {"head_dim": 15},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"intermediate_size": -1},
        {"num_hidden_layers": 0},
        {"rope_theta": 0, "rope_parameters": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": "yes"},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_sizes_of_the_draft_layers_are_held_to_the_same(head: Path, wrong: dict[str, Any]) -> None:
    path = head / "config.json"
    config = json.loads(path.read_text())
    config["transformer_layer_config"] |= wrong
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rope|partial|" + next(iter(wrong))):
        read_head(Checkpoint.open(head))


def test_random_configs(head: Path) -> None:
    path, rng = head / "config.json", random.Random(3)
    config, refused = json.loads(path.read_text()), 0
    for _ in range(400):
        path.write_text(json.dumps(mutated(config, rng)))
        try:
            read_head(Checkpoint.open(head))
        except CheckpointError:
            refused += 1
    assert 50 < refused < 400
