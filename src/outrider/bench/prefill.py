"""How fast prompts are run: tokens a second, and the share of what the device's matrix products could do."""

from __future__ import annotations

from statistics import median
from typing import Any

from outrider.bench.bandwidth import matmul_rate
from outrider.bench.batch import run_batch
from outrider.bench.provenance import provenance
from outrider.bench.speed import Workload, configuration, sampling_of
from outrider.engine.llm import LLM
from outrider.layers.parameter import activation_dtype
from outrider.models.config import ModelConfig


def prefill_operations(config: ModelConfig, num_prompts: int, input_len: int) -> tuple[int, int]:
    """Floating-point operations of a model that runs whole prompts: of products with weights, and of attention.

    A multiplication and an addition are two. Attention counts the keys that a token sees, itself included, and no
    others. The head is run for each prompt's last token only. A draft head's are not counted.
    """
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    head = num_prompts * config.hidden_size * config.vocab_size
    products = 2 * (num_prompts * input_len * config.num_layers * per_layer + head)
    seen = num_prompts * input_len * (input_len + 1) // 2
    return products, 4 * seen * config.num_layers * query


def bench_prefill(llm: LLM, num_prompts: int, input_len: int, repeats: int) -> dict[str, Any]:
    """Prompts that arrive at once, from there until each has its first token."""
    workload = Workload(input_len, 1)
    workload.check(llm, [num_prompts])
    runner = llm.engine.resolved.runner
    runs = [
        run_batch(llm.engine, workload.batch(llm, num_prompts, seed), sampling_of(workload))
        for seed in range(1 + repeats)
    ][1:]
    seconds = median(run.first_token for run in runs)
    products, attention = prefill_operations(runner.model_config, num_prompts, input_len)
    dtype = activation_dtype(runner.device, runner.dtype)
    best = matmul_rate(runner.device, dtype)
    reached = (products + attention) / seconds
    return {
        "config": configuration(llm, workload) | {"num_prompts": num_prompts},
        **provenance(runner.device),
        "tokens_per_second": num_prompts * input_len / seconds,
        "seconds": seconds,
        "all_seconds": [run.first_token for run in runs],
        "operations": {"products": products, "attention": attention},
        "tflops": reached / 1e12,
        "matmul_tflops": best / 1e12,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "share_of_matmul": reached / best,
    }
