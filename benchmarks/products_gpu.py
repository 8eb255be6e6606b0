"""The products of a model's decoder layers at few rows: this project's kernels beside cuBLAS, on a GPU.

    python benchmarks/products_gpu.py --output my_products.json
    python benchmarks/products_gpu.py --models qwen3-0.6b --rows 8 --sweep

All layers run one behind the other in a CUDA graph, each with random weights of its own, so that none come from a
cache: q, k and v; out; gate and up; down. Ours carry norms, gate and residual sums; cuBLAS has them as kernels of their
own, as a step of many rows has. Told are microseconds a layer, and the floor: its weights over this run's read rate.
`--sweep` times each product alone, cut up in every way of a grid, and prints the fastest; processes compile first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.kernels import recorded, time_on_device
from outrider.bench.provenance import provenance
from outrider.kernels.gpu.activation import silu_mul_gpu
from outrider.kernels.gpu.linear import FEW, TICKETS, Tiles, few_rows, tiles
from outrider.kernels.gpu.norm import rms_norm_gpu
from outrider.kernels.gpu.partial_norm import Rows, scale_rows
from outrider.kernels.gpu.triton import is_roomy
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig

SHAPES = Path(__file__).parent / "shapes"
NAMES = ("qkv", "out", "gate_up", "down")
FASTEST = 5
"""Cuts that a sweep prints of each product."""


@dataclass(frozen=True, slots=True)
class Product:
    """One of a layer's; `outputs` of a gate are its columns, of which each has two weight rows."""

    name: str
    outputs: int
    inputs: int

    @property
    def gate(self) -> bool:
        return self.name == "gate_up"

    @property
    def adds(self) -> bool:
        """Whether it adds to the residual stream, and norms that in part; the others read what is normed so."""
        return self.name in ("out", "down")

    def weight(self, seed: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        weight = torch.empty((1 + self.gate) * self.outputs, self.inputs, dtype=torch.bfloat16, device="cuda")
        return weight.normal_(0, self.inputs**-0.5, generator=generator)


def products(config: ModelConfig) -> list[Product]:
    hidden, wide, query = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    both = query + 2 * config.num_kv_heads * config.head_dim
    sizes = (both, hidden), (hidden, query), (wide, hidden), (hidden, wide)
    return [Product(name, *size) for name, size in zip(NAMES, sizes, strict=True)]


def draw(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, device="cuda").to(torch.bfloat16)


class Layers:
    """All layers' weights, and two ways to run their products on some rows."""

    def __init__(self, config: ModelConfig) -> None:
        self.products = products(config)
        self.weights = [[each.weight(layer) for each in self.products] for layer in range(config.num_layers)]
        self.norm = torch.ones(config.hidden_size, dtype=torch.bfloat16, device="cuda")
        self.tickets = torch.zeros(TICKETS, dtype=torch.int32, device="cuda")
        self.mixed_width = self.products[1].inputs

    @property
    def bytes_per_layer(self) -> int:
        return sum(weight.nbytes for weight in self.weights[0])

    def ours(self, rows: int) -> Callable[[], None]:
        stream, mixed = draw(rows, len(self.norm)), draw(rows, self.mixed_width)

        def run() -> None:
            source: Rows | None = scale_rows(None, stream, self.norm, 1e-6)
            for qkv, out, gate_up, down in self.weights:
                heads, gated = self._empty(rows, len(qkv)), self._empty(rows, down.shape[1])
                assert source is not None
                few_rows(source, qkv, heads, tickets=self.tickets, late=True)
                after = {"add": True, "next_norm": self.norm, "eps": 1e-6, "tickets": self.tickets}
                normed = few_rows(mixed, out, stream, **after)
                assert normed is not None
                few_rows(normed, gate_up, gated, gate=True, tickets=self.tickets)
                source = few_rows(gated, down, stream, **after)

        return run

    def cublas(self, rows: int) -> Callable[[], None]:
        stream, mixed = draw(rows, len(self.norm)), draw(rows, self.mixed_width)

        def run() -> None:
            for qkv, out, gate_up, down in self.weights:
                functional.linear(rms_norm_gpu(stream, self.norm, 1e-6), qkv)
                stream.addmm_(mixed, out.t())
                gated = silu_mul_gpu(functional.linear(rms_norm_gpu(stream, self.norm, 1e-6), gate_up))
                stream.addmm_(gated, down.t())

        return run

    @staticmethod
    def _empty(rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")


def compare(models: list[str], rows: list[int], bandwidth: float) -> Iterator[dict[str, Any]]:
    """A line for each model and number of rows."""
    for model in models:
        config = ModelConfig.from_dict(read_json(SHAPES / model / "config.json"))
        layers = Layers(config)
        for count in rows:
            took: dict[str, float | None] = {"ours_us": None}
            ways = {"cublas_us": layers.cublas(count)} | ({"ours_us": layers.ours(count)} if count <= FEW else {})
            for name, run in ways.items():
                run()  # compiles
                took[name] = 1e6 * time_on_device(recorded(run).replay) / config.num_layers
            yield {"model": model, "rows": count, "floor_us": 1e6 * layers.bytes_per_layer / bandwidth, **took}
        del layers
        torch.cuda.empty_cache()


def grid(rows: int, each: Product) -> list[Tiles]:
    """Ways to cut a product up that are worth a try."""
    if rows == 1:
        knobs = product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8), (2, 3, 4))
        found = [Tiles(outputs, inputs, 0, warps, stages) for outputs, inputs, warps, stages in knobs]
    else:
        teams = (1, 4, 1), (1, 4, 2), (1, 4, 4), (4, 4, 1), (4, 8, 1)  # slices, warps, parts
        more = product((8, 16, 32, 64), (64, 128, 256, 512, 1024), (2, 3, 4, 5), teams)
        found = [
            Tiles(outputs, inputs, slices, warps, stages, parts)
            for outputs, inputs, stages, (slices, warps, parts) in more
        ]
    return [cut for cut in found if _fits(cut, rows, each)]


def _fits(cut: Tiles, rows: int, each: Product) -> bool:
    lines, height = cut.outputs * (1 + each.gate), max(8, rows)
    whole = each.inputs % (cut.parts * cut.inputs) == 0 or cut.parts == 1
    shared = 2 * cut.inputs * (lines + height) * (cut.stages + (cut.slices == 1)) if cut.slices else 0
    tile = lines * cut.inputs // (32 * cut.warps)  # numbers of the first tile that a thread holds
    few_tiles = -(-each.outputs // cut.outputs) <= TICKETS or cut.parts == 1
    return whole and few_tiles and shared <= 220 << 10 and 16 <= tile <= 256 and (lines >= 16 or cut.slices == 0)


def run_one(each: Product, rows: int, cut: Tiles, weights: list[Tensor], tickets: Tensor) -> Callable[[], None]:
    x, out = draw(rows, each.inputs), draw(rows, each.outputs)
    norm, squares = torch.ones_like(out[0]), torch.ones(128, rows, device="cuda")
    given: Any = x if each.adds else Rows(x, squares, 1e-6)
    how: dict[str, Any] = {"add": True, "next_norm": norm, "eps": 1e-6} if each.adds else {"gate": each.gate}

    def run() -> None:
        for weight in weights:
            few_rows(given, weight, out, cut=cut, tickets=tickets, **how)

    return run


def compile_share(rank: int, ranks: int, todo: list[tuple[Product, int, Tiles]]) -> None:
    """A process's part of what there is to compile; what cannot be is found out again when it is timed."""
    tickets = torch.zeros(TICKETS, dtype=torch.int32, device="cuda")
    for each, rows, cut in todo[rank::ranks]:
        try:
            run_one(each, rows, cut, [each.weight(0)], tickets)()
        except Exception as error:
            print(f"{each.name} {cut}: {error}", file=sys.stderr)


def sweep(models: list[str], rows: list[int], processes: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The fastest cuts of each product, and the rule's own."""
    for model in models:
        found = products(ModelConfig.from_dict(read_json(SHAPES / model / "config.json")))
        todo = [(each, count, cut) for each in found for count in rows for cut in grid(count, each)]
        torch.multiprocessing.spawn(compile_share, (processes, todo), processes)
        tickets = torch.zeros(TICKETS, dtype=torch.int32, device="cuda")
        for each, count in product(found, rows):
            weights = [each.weight(seed) for seed in range(max(2, (400 << 20) // each.weight(0).nbytes))]
            own = tiles(count, each.outputs, each.inputs, 2, gate=each.gate, roomy=is_roomy(tickets.device))
            timed: list[tuple[float, Tiles]] = []
            for cut in {*grid(count, each), own}:
                run = run_one(each, count, cut, weights, tickets)
                try:
                    run()
                    timed.append((1e6 * time_on_device(recorded(run).replay) / len(weights), cut))
                except Exception as error:
                    print(f"{each.name} {cut}: {error}", file=sys.stderr)
            timed.sort()
            floor = 1e6 * weights[0].nbytes / bandwidth
            best = [{"us": us, "cut": cut._asdict()} for us, cut in timed[:FASTEST]]
            rule = next((us for us, cut in timed if cut == own), None)
            yield {
                "model": model,
                "product": each.name,
                "rows": count,
                "floor_us": floor,
                "rule_us": rule,
                "best": best,
            }


def told(line: dict[str, Any]) -> str:
    """A line for people."""
    if "best" in line:
        fastest = ", ".join(f"{one['us']:.2f} {tuple(one['cut'].values())}" for one in line["best"])
        rule = "-" if line["rule_us"] is None else f"{line['rule_us']:.2f}"
        return (
            f"{line['model']} {line['product']} M={line['rows']}: floor {line['floor_us']:.2f}, rule {rule}; {fastest}"
        )
    ours = "-" if line["ours_us"] is None else f"{line['ours_us']:.2f}"
    ratio = "" if line["ours_us"] is None else f"{line['cublas_us'] / line['ours_us']:.2f}x"
    return f"{line['model']:14}{line['rows']:>6}{line['floor_us']:>10.2f}{ours:>10}{line['cublas_us']:>10.2f}{ratio:>8}"


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["qwen3-8b", "qwen3-0.6b"])
    parser.add_argument("--rows", type=lambda text: [*map(int, text.split(","))], default=[1, 8, 16, 32, 64])
    parser.add_argument("--sweep", action="store_true", help="time every cut of a grid instead")
    parser.add_argument("--processes", type=int, default=8, help="that compile for a sweep")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args(given)
    for model in arguments.models:
        if not (SHAPES / model).is_dir():
            parser.error(f"no such shape: {model} (known: {', '.join(sorted(path.name for path in SHAPES.iterdir()))})")
    if arguments.sweep and max(arguments.rows) > FEW:
        parser.error(f"--rows {max(arguments.rows)}: only products of up to {FEW} rows are ours to cut up")
    if not torch.cuda.is_available():
        parser.error("these kernels are timed on a CUDA device, and there is none")
    device = torch.device("cuda", 0)
    bandwidth = read_bandwidth(device)
    result: dict[str, Any] = {**provenance(device), "read_gb_per_second": bandwidth / 1e9, "rows": []}
    lines = (
        sweep(arguments.models, arguments.rows, arguments.processes, bandwidth)
        if arguments.sweep
        else compare(arguments.models, arguments.rows, bandwidth)
    )
    print(
        f"{result['device']}, reads {bandwidth / 1e9:,.0f} GB/s; microseconds" + ("" if arguments.sweep else " a layer")
    )
    if not arguments.sweep:
        print(f"{'':14}{'rows':>6}{'floor':>10}{'ours':>10}{'cuBLAS':>10}{'ratio':>8}")
    with torch.inference_mode():
        for line in lines:
            result["rows"].append(line)
            print(told(line), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
