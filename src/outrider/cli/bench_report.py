"""What `outrider bench` prints for people: a page a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outrider.cli.common import out, say_if_unfaithful, table
from outrider.core.sizes import MIB

BAR = 40
_FIXED_WIDTH = Console(highlight=False, soft_wrap=True, width=180)


def print_speed(result: Mapping[str, Any]) -> None:
    """Tokens a second, the mean step and its parts, floors, memory, provenance."""
    config, rows = result["config"], result["rows"]
    _print_configuration(config)
    _print_rows(config, rows)
    for row in rows:
        _print_parts(row)
    if result["parts_error"]:
        out.print(f"[bold yellow]the device's times of a step's parts are missing: {escape(result['parts_error'])}[/]")
    _print_memory(result["memory"])
    print_provenance(result, f"reads {config['read_gb_per_second']:,.1f} GB/s")


def print_prefill(result: Mapping[str, Any]) -> None:
    """Tokens a second of prompts, and the share of the matmul rate."""
    config, operations = result["config"], result["operations"]
    _print_configuration(config)
    count, length = config["num_prompts"], config["input_len"]
    out.print(f"\n{count} prompts of {length:,} tokens, at most {config['max_num_batched_tokens']:,} tokens a step")
    attention = operations["attention"] / (operations["attention"] + operations["products"])
    for name, value in (
        ("tokens a second", f"{result['tokens_per_second']:,.0f}"),
        ("milliseconds", f"{1e3 * result['seconds']:,.1f}, the median of {len(result['all_seconds'])}"),
        ("TFLOP/s", f"{result['tflops']:,.1f}, of which attention {attention:.0%}"),
        ("one large product", f"{result['matmul_tflops']:,.1f} TFLOP/s in {result['matmul_dtype']}"),
        ("share of that", f"{result['share_of_matmul']:.1%}"),
    ):
        out.print(f"  {name:20}{value}")
    print_provenance(result)


def print_kernels(result: Mapping[str, Any]) -> None:
    """A table for each number of sequences."""
    config = result["config"]
    out.print(f"[bold]{escape(config['model'])}[/] {config['dtype']}, K {config['num_drafts']}")
    recorded = any(row["graph"] for row in result["rows"])
    for count in dict.fromkeys(row["rows"] for row in result["rows"]):
        title = f"\n{count} sequences of {config['context']:,} tokens; microseconds a call"
        heads = ("kernel", "reference", "times", "floor", "floor/kernel", "GB/s", "TFLOP/s", "")
        made = table(title, "op", "size", *heads)
        made.columns[1].justify = "left"
        for row in result["rows"]:
            if row["rows"] == count:
                made.add_row(*_kernel_cells(row, recorded))
        _print_table(made)
    if result["not_timed"]:
        out.print(f"not timed: {', '.join(result['not_timed'])}")
    rates = f"reads {config['read_gb_per_second']:,.1f} GB/s, multiplies {config['matmul_tflops']:,.1f} TFLOP/s"
    print_provenance(result, rates)


def print_provenance(result: Mapping[str, Any], *more: str) -> None:
    """Without it a number is a rumour."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    out.print(f"\n[dim]{escape('; '.join((result['device'], *more, 'commit ' + str(result['commit']))))}[/]")
    out.print(f"[dim]{escape(versions)}[/]\n[dim]{escape(result['command'])}[/]")


def _print_configuration(config: Mapping[str, Any]) -> None:
    drafts = config["method"]
    if config["num_speculative_tokens"]:
        drafts += f", {config['num_speculative_tokens']} tokens a round"
    out.print(f"[bold]{escape(config['model'])}[/] {config['dtype']}, runner {config['runner']}, drafts {drafts}")
    say_if_unfaithful(config["faithful"], config["verifier"])


def _print_rows(config: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    cut = f", cut off after {config['max_steps']} steps" if config["max_steps"] else ""
    made = table(
        f"\n{config['input_len']} tokens in, {config['output_len']} out, {config['prompts']}{cut}",
        "concurrency",
        "tokens/s, steady",
        "with prefill",
        "first token ms",
        "step ms",
        "floor ms",
        "floor/step",
        "gap",
        "acceptance length",
    )
    for row in rows:
        steady, gap = row["steady_tokens_per_second"], _gap_share(row["parts_ms"])
        made.add_row(
            str(row["concurrency"]),
            "-" if steady is None else f"{steady:,.1f}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['step_ms']:.3f}",
            f"{row['floor_ms']:.3f}",
            f"{row['floor_share']:.2f}",
            "-" if gap is None else f"{gap:.1%}",
            f"{row['acceptance_length']:.2f}",
        )
    _print_table(made)
    if any(row["num_preemptions"] for row in rows):
        out.print("[bold yellow]requests were preempted: the cache is too small for so many, figures mean little[/]")


def _print_table(made: Table) -> None:
    """With every figure whole, also where the output is no terminal and would be taken for a narrow one."""
    (out if out.is_terminal else _FIXED_WIDTH).print(made)


def _gap_share(parts: Mapping[str, float]) -> float | None:
    total = sum(parts.values())
    return parts["gap"] / total if "gap" in parts and total else None


def _print_parts(row: Mapping[str, Any]) -> None:
    """Bars of a mean step."""
    parts, total = row["parts_ms"], sum(row["parts_ms"].values())
    if not total:
        return
    where = "on the device, of steps that are timed" if row["parts_on"] == "device" else "of the host's time"
    out.print(f"\na step at concurrency {row['concurrency']}: {total:.3f} ms {where}")
    for name, value in parts.items():
        bar = "█" * round(BAR * value / total)
        out.print(f"  {name:10}{value:9.3f} ms {value / total:6.1%} [cyan]{bar}[/]")
    floor = row["floor_parts_ms"]
    drafting = f" + draft head {floor['draft']:.3f}" if floor["draft"] else ""
    out.print(
        f"  floor: weights {floor['target']:.3f}{drafting} ms; keys and values, not counted, {floor['cache']:.3f} ms"
    )


def _print_memory(memory: Mapping[str, Any]) -> None:
    plan = memory["plan"]
    shown = {"workspace": "workspace, at most", "cache": "keys and values"}
    sizes = [
        f"{shown.get(name, name)} {plan[name] / MIB:,.0f}"
        for name in ("weights", "workspace", "programs", "cache")
        if name in plan
    ]
    line = f"\nmemory in MiB, as planned: {', '.join(sizes)} ({plan['num_tokens']:,} tokens)"
    if memory["used"] is not None:
        beside = memory["beside_weights_and_cache"] / MIB
        line += f"; measured: {memory['used'] / MIB:,.0f} in all, {beside:,.0f} beside weights and cache"
    if memory["recorded"] is not None:
        line += f"; recorded in {memory['recorded']['seconds']:.1f} s, {memory['recorded']['bytes'] / MIB:,.0f} MiB"
    out.print(line)


def _kernel_cells(row: Mapping[str, Any], recorded: bool) -> list[str]:
    """`recorded`: kernels are timed in CUDA graphs, so that one which is not is noted."""
    ours, theirs, floor = row["kernel_us"], row["reference_us"], row["floor_us"]

    def cell(value: float | None, form: str = ",.1f") -> str:
        return "-" if value is None else format(value, form)

    notes = ["no graph"] if recorded and ours is not None and not row["graph"] else []
    return [
        row["op"],
        escape(row["case"]),
        cell(ours),
        cell(theirs),
        cell(theirs / ours if ours and theirs else None, ".1f"),
        cell(floor, ",.2f"),
        cell(floor / ours if ours else None, ".2f"),
        cell(row["num_bytes"] / ours / 1e3 if ours else None, ",.0f"),
        cell(row["operations"] / ours / 1e6 if ours and row["operations"] else None, ",.2f"),
        escape("; ".join([*notes, *row["errors"]])),
    ]
