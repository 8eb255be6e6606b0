"""Where the time of decoder layers goes on a GPU: all of a model in one CUDA graph, whole and with a part left out.

    python benchmarks/layers_gpu.py --output benchmarks/results/gpu_layers.json
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
from torch import Tensor

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.kernels import recorded, time_on_device
from outrider.bench.provenance import provenance
from outrider.kernels.decoder_layer import LayerWeights, take_taps
from outrider.kernels.gpu import decoder_layer
from outrider.kernels.gpu.linear import FEW
from outrider.kernels.gpu.partial_norm import Rows
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig

SHAPES = Path(__file__).parent / "shapes"
BLOCK_SIZE = 16
ATTENTION = "attention"
PRODUCTS = ("qkv", "out", "gate_up", "down")
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "all": (),
    **{f"without {part}": (part,) for part in (ATTENTION, *PRODUCTS)},
    "attention alone": PRODUCTS,
}


class Layers:
    """All layers of a model, and the steps that can be run through them."""

    def __init__(self, config: ModelConfig, device: torch.device, sequences: int, context: int) -> None:
        self._config, self._device, self._context = config, device, context
        self._blocks = -(-context // BLOCK_SIZE)
        shape = (sequences * self._blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self._weights = [self._layer() for _ in range(config.num_layers)]
        self._of = {weight.data_ptr(): name for layer in self._weights for name, weight in self._products(layer)}
        self._stack = decoder_layer.GpuLayerStack(
            self._weights,
            [(self._random(*shape), self._random(*shape)) for _ in self._weights],
            config.rms_norm_eps,
            config.num_heads,
            config.head_dim**-0.5,
            **dict.fromkeys(("rms_norm", "add_rms_norm", "silu_mul", "multiply", "rope_store", "attend"), _not_called),
            take_taps=take_taps,
        )

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=self._device).normal_(0, scale)

    def _layer(self) -> LayerWeights:
        config, hidden = self._config, self._config.hidden_size
        query, both = config.num_heads * config.head_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        norm, head_norm = (
            torch.ones(size, dtype=torch.bfloat16, device=self._device) for size in (hidden, config.head_dim)
        )
        sizes = (
            (both, hidden),
            (hidden, query),
            (2 * config.intermediate_size, hidden),
            (hidden, config.intermediate_size),
        )
        qkv, out, gate_up, down = (self._random(*size, scale=size[1] ** -0.5) for size in sizes)
        return LayerWeights(norm, qkv, None, head_norm, head_norm, out, norm, gate_up, down)

    @staticmethod
    def _products(layer: LayerWeights) -> list[tuple[str, Tensor]]:
        return [(name, getattr(layer, name)) for name in PRODUCTS]

    @property
    def bytes_per_layer(self) -> int:
        return sum(weight.nbytes for _, weight in self._products(self._weights[0]))

    def step(self, sequences: int, num_query: int) -> Callable[[], None]:
        """A step in which the last `num_query` tokens of each sequence's context are run."""
        device, last = self._device, torch.arange(self._context - num_query, self._context)
        table = torch.arange(sequences * self._blocks, dtype=torch.int32).view(sequences, self._blocks)
        slots = torch.cat([row.long()[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE for row in table])
        where = (
            torch.randn(self._context, self._config.head_dim, device=device),
            last.repeat(sequences).to(device),
            slots.to(device),
            table.to(device),
            torch.arange(0, sequences * num_query + 1, num_query, dtype=torch.int32, device=device),
            torch.full((sequences,), self._context, dtype=torch.int32, device=device),
        )
        residual = self._random(sequences * num_query, self._config.hidden_size)
        return lambda: self._stack(0, len(self._weights), None, residual, *where)

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
            ahead = given[-1] and "qkv" not in parts
            return mixed[: len(heads)] if ATTENTION in parts else attention(heads, *given[:-1], ahead)

        with patch.multiple(decoder_layer, few_rows=multiply, rope_attention_gpu=mix):
            yield


def _not_called(*given: Any) -> Any:
    raise AssertionError("a step of few rows, all short, needs no op of long ones")


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
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--steps", type=_steps, default=[(1, 1), (1, 8), (8, 1)], help="as 1x1,1x8")
    parser.add_argument("--context", type=int, default=384, help="tokens each sequence holds, the step's own included")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args(given)
    if not (SHAPES / arguments.model).is_dir():
        parser.error(
            f"no such shape: {arguments.model} (known: {', '.join(sorted(path.name for path in SHAPES.iterdir()))})"
        )
    for sequences, num_query in arguments.steps:
        if sequences * num_query > FEW:
            parser.error(f"--steps {sequences}x{num_query}: products of more than {FEW} rows are not this project's")
        if num_query > arguments.context:
            parser.error(f"--context {arguments.context} is less than the {num_query} tokens of a step")
    if not torch.cuda.is_available():
        parser.error("these kernels are timed on a CUDA device, and there is none")
    device = torch.device("cuda", 0)
    bandwidth = read_bandwidth(device)
    config = ModelConfig.from_dict(read_json(SHAPES / arguments.model / "config.json"))
    result: dict[str, Any] = {**provenance(device), "model": arguments.model, "context": arguments.context}
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
