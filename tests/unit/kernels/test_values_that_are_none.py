"""A token whose value holds a NaN or inf: queries that see it get NaN, and those before it are as without it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

from kernel_examples.layers import rope_attention_case
from outrider.kernels.attention import paged_attention_reference
from outrider.kernels.cpu.attention import paged_attention_cpu
from outrider.kernels.cpu.rope import rope_store_cpu
from outrider.kernels.gpu.attention import paged_attention_gpu
from outrider.kernels.gpu.rope import rope_store_gpu
from outrider.kernels.gpu.rope_attention import rope_attention_gpu
from outrider.kernels.rope import rope_store_reference

INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)
CPU = torch.device("cpu")
LENGTHS = [(4, 37), (1, 20), (6, 6)]
SPOILT = 2
"""The query token, of the first row, whose value holds no number."""


def in_two(store: Any, attend: Any) -> Any:
    def run(qkv: Any, norms: Any, rope: Any, rows: Any, key_cache: Any, value_cache: Any, scale: float) -> Any:
        query = store(qkv, norms, rope, rows, key_cache, value_cache)
        return attend(query, key_cache, value_cache, rows, scale)

    return run


WAYS = [
    pytest.param(in_two(rope_store_reference, paged_attention_reference), id="reference"),
    pytest.param(in_two(rope_store_cpu, paged_attention_cpu), id="cpu"),
    pytest.param(in_two(rope_store_gpu, paged_attention_gpu), id="gpu, two kernels", marks=INTERPRETED),
    pytest.param(rope_attention_gpu, id="gpu, one kernel", marks=INTERPRETED),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_is_none_reaches_only_those_who_see_it(way: Any, cache: torch.dtype, value: float) -> None:
    if value == 3.4e38 and cache == torch.float32:
        pytest.skip("a number that rounds to inf in bfloat16 only")
    heads = num_heads, num_kv_heads, head_dim = 4, 2, 64
    drawn = torch.Generator().manual_seed(3)
    example = dict(rope_attention_case(drawn, CPU, LENGTHS, heads, torch.float32, cache))
    example["rows"] = example["rows"]._replace(cache_slot=example["rows"].cache_slot.clone())
    assert (example["rows"].cache_slot[: SPOILT + 1] >= 0).all()
    good = {name: given.clone() if isinstance(given, torch.Tensor) else given for name, given in example.items()}
    expected = way(**good)
    example["qkv"][SPOILT, (num_heads + num_kv_heads) * head_dim + 5] = value
    found = way(**example)
    of_head = found.unflatten(1, (num_kv_heads, -1))
    assert of_head[SPOILT : LENGTHS[0][0], 0].isnan().all()
    others = torch.ones_like(of_head, dtype=torch.bool)
    others[SPOILT : LENGTHS[0][0], 0] = False
    assert torch.equal(of_head[others], expected.unflatten(1, (num_kv_heads, -1))[others])
    assert not example["value_cache"].isnan().any() and not example["value_cache"].isinf().any()
