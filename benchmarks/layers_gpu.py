"""Where the time of decoder layers goes on a GPU: all of a model in one CUDA graph, whole and with a part left out.

    python benchmarks/layers_gpu.py --output my_layers.json
    python benchmarks/layers_gpu.py --model qwen3-0.6b --steps 1x1,1x8 --context 4096

Kernels overlap: each loads weights while the one in front ends, so what a kernel takes alone says little about a step.
Told are microseconds a layer: all of it; without attention, or without one of the four products; attention alone; and
the floor, a layer's weights over this run's read rate. `--steps` are sequences x query tokens of each, at most as many
rows as our own products take. Weights and caches are random, every layer has its own, and results mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from products_gpu import NAMES, SHAPES, products
from torch import Tensor

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.kernels import recorded, time_on_device
from outrider.bench.provenance import provenance
from outrider.kernels.gpu import decoder_layer
from outrider.kernels.gpu.attention import multiprocessors
from outrider.kernels.gpu.linear import FEW
from outrider.kernels.gpu.partial_norm import Rows
from outrider.kernels.gpu.rope_attention import is_short
from outrider.kernels.records import LayerWeights
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig
from outrider.tensors import PagedRows

BLOCK_SIZE = 16
ATTENTION = "attention"
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "all": (),
    **{f"without {part}": (part,) for part in (ATTENTION, *NAMES)},
    "attention alone": NAMES,
}


class Layers:
    """All layers of a model, and the steps that can be run through them."""

    def __init__(self, config: ModelConfig, device: torch.device, sequences: int, context: int) -> None:
        self._config, self._device, self._context = config, device, context
        self._blocks = -(-context // BLOCK_SIZE)
        shape = (sequences * self._blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self._weights = [self._layer() for _ in range(config.num_layers)]
        self._of = {weight.data_ptr(): name for layer in self._weights for name, weight in self._products(layer)}
        self._stack = decoder_layer.DeviceLayerStack(
            self._weights,
            [(self._random(*shape), self._random(*shape)) for _ in self._weights],
            config.rms_norm_eps,
            config.head_dim**-0.5,
        )

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=self._device).normal_(0, scale)

    def _layer(self) -> LayerWeights:
        sizes = self._config.hidden_size, self._config.head_dim
        norm, head_norm = (torch.ones(size, dtype=torch.bfloat16, device=self._device) for size in sizes)
        qkv, out, gate_up, down = (
            self._random((1 + each.gate) * each.outputs, each.inputs, scale=each.inputs**-0.5)
            for each in products(self._config)
        )
        return LayerWeights(norm, qkv, None, head_norm, head_norm, out, norm, gate_up, down)

    @staticmethod
    def _products(layer: LayerWeights) -> list[tuple[str, Tensor]]:
        return [(name, getattr(layer, name)) for name in NAMES]

    @property
    def bytes_per_layer(self) -> int:
        return sum(weight.nbytes for _, weight in self._products(self._weights[0]))

    def step(self, sequences: int, num_query: int) -> Callable[[], None]:
        """A step in which the last `num_query` tokens of each sequence's context are run."""
        device, last = self._device, torch.arange(self._context - num_query, self._context)
        table = torch.arange(sequences * self._blocks, dtype=torch.int32).view(sequences, self._blocks)
        slots = torch.cat([row.long()[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE for row in table])
        rope = torch.randn(self._context, self._config.head_dim, device=device)
        rows = PagedRows(
            last.repeat(sequences).to(device),
            slots.to(device),
            table.to(device),
            torch.arange(0, sequences * num_query + 1, num_query, dtype=torch.int32, device=device),
            torch.full((sequences,), self._context, dtype=torch.int32, device=device),
        )
        residual = self._random(sequences * num_query, self._config.hidden_size)
        return lambda: self._stack(0, len(self._weights), None, residual, rope, rows)

    @contextmanager
    def without(self, parts: tuple[str, ...]) -> Iterator[None]:
        """Leaves parts of every layer out. What would have read theirs finds zeros, or whatever was there."""
        few_rows, attention = decoder_layer.few_rows, decoder_layer.rope_attention_gpu
        mixed = self._random(FEW, 1, self._config.num_heads * self._config.head_dim, scale=0.0)
        normed, square = self._random(FEW, self._config.hidden_size, scale=0.0), torch.ones(FEW, device=self._device)

        def multiply(x: Tensor | Rows, weight: Tensor, out: Tensor, **how: Any) -> Rows | None:
            if self._of[weight.data_ptr()] not in parts:
                late = how.pop("late", False) and ATTENTION not in parts
                return few_rows(x, weight, out, **how, late=late)
            if how.get("next_norm") is None:
                return None
            return Rows(normed[: len(out)], square[None, : len(out)], how["eps"])

        def mix(heads: Tensor, *given: Any) -> Tensor:
            *others, ahead, next_weight = given
            ahead = ahead and "qkv" not in parts
            next_weight = None if "out" in parts else next_weight
            return mixed[: len(heads)] if ATTENTION in parts else attention(heads, *others, ahead, next_weight)

        with patch.multiple(decoder_layer, few_rows=multiply, rope_attention_gpu=mix):
            yield


def runs_in_few(config: ModelConfig, sequences: int, num_query: int, processors: int) -> bool:
    """Whether such a step is all in the kernels for few rows: those for long ones are not timed here."""
    group = config.num_heads // config.num_kv_heads
    return is_short(sequences * num_query, sequences, group, config.num_kv_heads, processors)


def measure(
    layers: Layers, num_layers: int, sequences: int, num_query: int, time: Callable[[Callable[[], None]], float]
) -> dict[str, float]:
    """Microseconds a layer, by what is left out."""
    found: dict[str, float] = {}
    run = layers.step(sequences, num_query)
    for name, parts in LEFT_OUT.items():
        with layers.without(parts):
            found[name] = 1e6 * time(run) / num_layers
    return found


def in_a_graph(run: Callable[[], None]) -> float:
    """Seconds of the device's time, recorded."""
    run()  # compiles
    return time_on_device(recorded(run).replay)


def _steps(text: str) -> list[tuple[int, int]]:
    found = [tuple(map(int, step.split("x"))) for step in text.split(",")]
    if any(len(step) != 2 or min(step) < 1 for step in found):
        raise ValueError(text)
    return [(sequences, num_query) for sequences, num_query in found]


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    parser.add_argument("--steps", type=_steps, default=[(1, 1), (1, 8), (8, 1)], help="as 1x1,1x8")
    parser.add_argument("--context", type=int, default=384, help="tokens each sequence holds, the step's own included")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args(given)
    for sequences, num_query in arguments.steps:
        if sequences * num_query > FEW:
            parser.error(f"--steps {sequences}x{num_query}: products of more than {FEW} rows are not this project's")
        if num_query > arguments.context:
            parser.error(f"--context {arguments.context} is less than the {num_query} tokens of a step")
    if not torch.cuda.is_available():
        parser.error("these kernels are timed on a CUDA device, and there is none")
    device = torch.device("cuda", 0)
    config = ModelConfig.from_dict(read_json(SHAPES / arguments.model / "config.json"))
    for sequences, num_query in arguments.steps:
        if not runs_in_few(config, sequences, num_query, multiprocessors(device)):
            parser.error(
                f"--steps {sequences}x{num_query}: attention of so many tokens is not one kernel on this device"
            )
    result: dict[str, Any] = {**provenance(device), "model": arguments.model, "context": arguments.context}
    bandwidth = read_bandwidth(device)
    with torch.inference_mode():
        layers = Layers(config, device, max(sequences for sequences, _ in arguments.steps), arguments.context)
        result |= {
            "floor_us": 1e6 * layers.bytes_per_layer / bandwidth,
            "read_gb_per_second": bandwidth / 1e9,
            "steps": [],
        }
        print(
            f"{result['device']}, reads {bandwidth / 1e9:,.0f} GB/s; {arguments.model}, {arguments.context} tokens of"
        )
        print(f"context; microseconds a layer, floor {result['floor_us']:.2f}")
        print(" " * 8 + "".join(f"{name:>18}" for name in LEFT_OUT))
        for sequences, num_query in arguments.steps:
            found = measure(layers, config.num_layers, sequences, num_query, in_a_graph)
            result["steps"].append({"sequences": sequences, "query_tokens": num_query, "us": found})
            print(f"{sequences}x{num_query:<6}" + "".join(f"{us:>18.2f}" for us in found.values()), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
