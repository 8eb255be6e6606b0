"""The CPU kernels against torch eager, op by op, beside the time it takes only to read what the op must read.

    python benchmarks/kernels_cpu.py [--shape small|qwen3-0.6b] [--rows 1 8] [--rounds 9] [--json]

Every candidate passes through all layers of the model in turn, round after round: weights come from where they would
in a step, and what else the machine does meets all candidates alike. Times are medians of a call; `x bf16` and `x fp32`
are medians of the ratios within a round; `floor` is the share of the time that reading alone takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from outrider.bench.provenance import provenance
from outrider.kernels.activation import SILU_MUL
from outrider.kernels.attention import PAGED_ATTENTION
from outrider.kernels.cpu.emit import Emitter, Int, Vector, emitted
from outrider.kernels.cpu.jit import Kernel, task
from outrider.kernels.cpu.threads import add, num_threads, parallel
from outrider.kernels.decoder_layer import DECODER_LAYER
from outrider.kernels.linear import LINEAR
from outrider.kernels.norm import ADD_RMS_NORM, RMS_NORM
from outrider.kernels.records import HeadNorms, LayerWeights
from outrider.kernels.rope import ROPE_STORE
from outrider.tensors import PagedRows

CONTEXT, BLOCK = 512, 16


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int


SHAPES = {
    "small": Shape(256, 14, 4, 2, 64, 768, 6144),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936),
}


@emitted
def _read_part(emitter: Emitter, data: Int, size: Int, out: Int) -> None:
    def step(index: Int, mask: Vector | None, sums: list[Vector]) -> list[Vector]:
        return [emitter.builder.fadd(sums[0], emitter.load(data, index, mask))]

    def fetch(index: Int) -> None:
        for line in range(8):
            emitter.prefetch(data, emitter.plus(index, 256 + 16 * line, 1), 4)

    emitter.store(emitter.sweep(size, step, [emitter.floats(0)], 8, fetch)[0], out, 0)


@task()
def _read_tasks(tickets: int, data: int, size: int, share: int, out: int) -> None:
    while True:
        start = add(tickets, 1) * share
        if start >= size:
            break
        _read_part(data + start * 4, min(share, size - start), out)


@Kernel
def _read_kernel(data: int, size: int, share: int, out: int, threads: int) -> None:
    parallel(_read_tasks, threads, (data, size, share, out))


SINK = torch.empty(16)


def read(*tensors: Tensor) -> None:
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size() // 4
        share = min(max(size // (4 * num_threads()), 1 << 13), 1 << 18)
        _read_kernel.launch(tensor.data_ptr(), size, share, SINK.data_ptr(), num_threads())


Call = Callable[[int], Any]  # of a layer's index


@dataclass(frozen=True)
class Case:
    """One op: what runs it, by candidate, and the bytes that it cannot do without."""

    name: str
    layers: int
    num_bytes: int
    candidates: dict[str, Call]


class Eager:
    """The model's layers in plain torch and one dtype, with a cache that needs no pages."""

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        shape, self.dtype = bench.shape, dtype
        self.shape = shape
        self.weights = {name: [each.to(dtype) for each in stored] for name, stored in bench.weights.items()}
        self.caches = [torch.randn(2, 1, shape.kv_heads, CONTEXT, shape.head_dim).to(dtype) for _ in bench.caches]
        self.gain, self.head_gain = torch.ones(shape.hidden).to(dtype), torch.ones(shape.head_dim).to(dtype)
        cos, sin = bench.rope[bench.positions].to(dtype).chunk(2, dim=-1)
        self.cos, self.sin = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((sin, sin), -1).unsqueeze(1)
        self.positions = bench.positions
        self.mask = torch.arange(CONTEXT) <= bench.positions.unsqueeze(1)

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), gain, 1e-6)

    def turn(self, heads: Tensor) -> Tensor:
        heads = self.norm(heads, self.head_gain)
        low, high = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat((-high, low), dim=-1) * self.sin

    def rope(self, qkv: Tensor, i: int) -> Tensor:
        shape = self.shape
        heads = qkv.unflatten(-1, (-1, shape.head_dim))
        query, key, value = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        self.caches[i][0, 0, :, self.positions] = self.turn(key).transpose(0, 1)
        self.caches[i][1, 0, :, self.positions] = value.transpose(0, 1)
        return self.turn(query)

    def attend(self, query: Tensor, i: int) -> Tensor:
        key, value = self.caches[i]
        heads = query.transpose(0, 1).unsqueeze(0)
        mixed = functional.scaled_dot_product_attention(heads, key, value, self.mask, enable_gqa=True)
        return mixed[0].transpose(0, 1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def layer(self, x: Tensor, i: int) -> Tensor:
        query = self.rope(functional.linear(self.norm(x, self.gain), self.weights["qkv"][i]), i)
        x = x + functional.linear(self.attend(query, i).flatten(1), self.weights["out"][i])
        gated = self.silu_mul(functional.linear(self.norm(x, self.gain), self.weights["gate_up"][i]))
        return x + functional.linear(gated, self.weights["down"][i])


class Bench:
    """Weights, caches and inputs of one shape and height."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self.shape, self.rows = shape, rows
        both = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        sizes = {
            "qkv": (both, shape.hidden),
            "out": (shape.hidden, shape.heads * shape.head_dim),
            "gate_up": (2 * shape.width, shape.hidden),
            "down": (shape.hidden, shape.width),
            "head": (shape.vocab, shape.hidden),
        }
        self.weights = {
            name: [(torch.randn(size) * 0.02).bfloat16() for _ in range(1 if name == "head" else shape.layers)]
            for name, size in sizes.items()
        }
        blocks = CONTEXT // BLOCK
        self.caches = [torch.randn(2, blocks, shape.kv_heads, BLOCK, shape.head_dim) for _ in range(shape.layers)]
        self.table = torch.randperm(blocks).int().unsqueeze(0)
        self.positions = torch.arange(CONTEXT - rows, CONTEXT)
        slots = self.table[0, self.positions // BLOCK].long() * BLOCK + self.positions % BLOCK
        starts, lens = torch.tensor([0, rows]).int(), torch.tensor([CONTEXT]).int()
        self.paged = PagedRows(self.positions, slots, self.table, starts, lens)
        self.rope = torch.randn(CONTEXT, shape.head_dim)
        self.eager = {"bf16": Eager(self, torch.bfloat16), "fp32": Eager(self, torch.float32)}

    def case(self, name: str, ours: Call, theirs: Callable[[Eager], Call], *reads: list[Tensor]) -> Case:
        candidates = {"ours": ours, **{kind: theirs(eager) for kind, eager in self.eager.items()}}
        if reads:
            candidates["read"] = lambda i: read(*(each[i] for each in reads))
        size = sum(each[0].numel() * each[0].element_size() for each in reads)
        return Case(name, len(reads[0]) if reads else self.shape.layers, size, candidates)

    def linears(self) -> list[Case]:
        linear, cases = LINEAR.on("cpu"), []
        for name, stored in self.weights.items():
            x = torch.randn(self.rows, stored[0].shape[1])

            def theirs(eager: Eager, name: str = name, x: Tensor = x) -> Call:
                narrow = x.to(eager.dtype)
                return lambda i: functional.linear(narrow, eager.weights[name][i])

            def ours(i: int, stored: list[Tensor] = stored, x: Tensor = x) -> Tensor:
                return linear(x, stored[i])

            cases.append(self.case(f"linear {name} {list(stored[0].shape)}", ours, theirs, stored))
        return cases

    def small(self) -> list[Case]:
        """Ops that read next to nothing: what they cost is the call."""
        rms_norm, add_rms_norm, silu_mul = RMS_NORM.on("cpu"), ADD_RMS_NORM.on("cpu"), SILU_MUL.on("cpu")
        x, gate_up = torch.randn(self.rows, self.shape.hidden), torch.randn(self.rows, 2 * self.shape.width)
        residual, gain = torch.zeros_like(x), torch.ones(self.shape.hidden).bfloat16()

        def norm(eager: Eager) -> Call:
            narrow = x.to(eager.dtype)
            return lambda i: eager.norm(narrow, eager.gain)

        def add_norm(eager: Eager) -> Call:
            narrow = x.to(eager.dtype)
            return lambda i: eager.norm(narrow + narrow, eager.gain)

        def silu(eager: Eager) -> Call:
            narrow = gate_up.to(eager.dtype)
            return lambda i: eager.silu_mul(narrow)

        return [
            self.case("rms_norm", lambda i: rms_norm(x, gain, 1e-6), norm),
            self.case("add_rms_norm", lambda i: add_rms_norm(x, residual, gain, 1e-6), add_norm),
            self.case("silu_mul", lambda i: silu_mul(gate_up), silu),
        ]

    def cached(self) -> list[Case]:
        rope_store, attention, layer = ROPE_STORE.on("cpu"), PAGED_ATTENTION.on("cpu"), DECODER_LAYER.on("cpu")
        shape, weights, scale = self.shape, self.weights, self.shape.head_dim**-0.5
        qkv = torch.randn(self.rows, weights["qkv"][0].shape[0])
        query, x = torch.randn(self.rows, shape.heads, shape.head_dim), torch.randn(self.rows, shape.hidden)
        gain, head_gain = torch.ones(shape.hidden).bfloat16(), torch.ones(shape.head_dim).bfloat16()
        norms = HeadNorms(head_gain, head_gain, 1e-6)

        def our_rope(i: int) -> Tensor:
            return rope_store(qkv, norms, self.rope, self.paged, *self.caches[i])

        def our_layer(i: int) -> Tensor | None:
            qkv, out, gate_up, down = (weights[name][i] for name in ("qkv", "out", "gate_up", "down"))
            own = LayerWeights(gain, qkv, None, head_gain, head_gain, out, gain, gate_up, down)
            return layer(x, torch.zeros_like(x), own, 1e-6, self.rope, self.paged, *self.caches[i], scale)

        def rope(eager: Eager) -> Call:
            narrow = qkv.to(eager.dtype)
            return lambda i: eager.rope(narrow, i)

        def attend(eager: Eager) -> Call:
            narrow = query.to(eager.dtype)
            return lambda i: eager.attend(narrow, i)

        def whole(eager: Eager) -> Call:
            narrow = x.to(eager.dtype)
            return lambda i: eager.layer(narrow, i)

        stored = [weights[name] for name in ("qkv", "out", "gate_up", "down")]
        return [
            self.case("rope_store", our_rope, rope),
            self.case(
                f"attention over {CONTEXT}",
                lambda i: attention(query, *self.caches[i], self.paged, scale),
                attend,
                self.caches,
            ),
            self.case("decoder_layer", our_layer, whole, self.caches, *stored),
        ]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in case.candidates}

    def one_pass(call: Call) -> float:
        start = time.perf_counter()
        for layer in range(case.layers):
            call(layer)
        return (time.perf_counter() - start) / case.layers

    for _ in range(rounds):
        for name, call in case.candidates.items():
            time.sleep(0.05)  # torch's threads spin for a while after their last work
            awake = time.perf_counter() + 0.03
            while time.perf_counter() < awake:  # and both cores must be up again
                one_pass(call)
            times[name].append(one_pass(call))

    def ratio(name: str) -> float | None:
        pairs = zip(times.get(name, ()), times["ours"], strict=False)
        found = [theirs / ours for theirs, ours in pairs]
        return statistics.median(found) if found else None

    return {
        "op": case.name,
        "microseconds": {name: 1e6 * statistics.median(found) for name, found in times.items()},
        "best_microseconds": {name: 1e6 * min(found) for name, found in times.items()},
        "gigabytes_per_second": case.num_bytes / statistics.median(times["ours"]) / 1e9 if case.num_bytes else None,
        "times_bf16": ratio("bf16"),
        "times_fp32": ratio("fp32"),
        "floor": ratio("read"),
    }


def table(row: dict[str, Any]) -> str:
    def number(value: float | None, unit: str = "") -> str:
        return f"{'' if value is None else f'{value:.2f}{unit}':>9}"

    times = "".join(f"{row['microseconds'].get(name, float('nan')):10.1f}" for name in ("ours", "bf16", "fp32", "read"))
    return f"{row['op']:32}{times}" + "".join(
        number(row[name], unit)
        for name, unit in (("times_bf16", "x"), ("times_fp32", "x"), ("floor", ""), ("gigabytes_per_second", ""))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    report = {**provenance(torch.device("cpu")), "context": CONTEXT, "rows": []}
    if not options.json:
        print(*(f"{name}: {value}" for name, value in report.items() if name != "rows"), sep="\n")
    for name in options.shape:
        for rows in options.rows:
            if not options.json:
                print(f"\n{name}, {rows} rows, microseconds a call")
                heads = ("ours", "bf16", "fp32", "read"), ("x bf16", "x fp32", "floor", "GB/s")
                print(f"{'':32}" + "".join(f"{head:>10}" for head in heads[0]) + "".join(f"{h:>9}" for h in heads[1]))
            bench = Bench(SHAPES[name], rows)
            for case in (*bench.linears(), *bench.small(), *bench.cached()):
                row = {"shape": name, "rows": rows, **measure(case, options.rounds)}
                report["rows"].append(row)
                if not options.json:
                    print(table(row))
    if options.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
