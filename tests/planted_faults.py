"""Plants one fault at a time in a copy of the tree, and asks whether `make test` would catch it.

A fault is one text of one file, replaced by another: an edge of a kernel, or a rule of the engine. The tests named
with it must fail; they are run as `make test` runs them, without those marked `slow`. `test_planted_faults.py` keeps
the list fit for use: each text must stand in its file once.

Usage: planted_faults.py [--only TEXT]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCE = Path("src/outrider")
SELECTED = "not gpu and not slow and not clients"


class Fault(NamedTuple):
    """A text of a file under src/outrider, what stands for it, and the tests that must fail then."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest


def op(name: str, device: str) -> tuple[str, ...]:
    """The comparison of one op's kernel with its reference."""
    return (f"tests/test_kernels.py::test_kernel_agrees_with_reference[{name}-{device}]",)


def gpu(name: str, old: str, new: str, *tests: str, file: str = "") -> Fault:
    """A fault of a GPU kernel, which Triton's interpreter must find on small examples."""
    return Fault(f"kernels/gpu/{file or name}.py", old, new, tests or op(name, "interpreter"))


def cpu(name: str, old: str, new: str, *tests: str, file: str = "") -> Fault:
    """A fault of a CPU kernel."""
    return Fault(f"kernels/cpu/{file or name}.py", old, new, tests or op(name, "cpu"))


FAULTS = (
    # edges of the GPU kernels
    gpu("accept_drafts", "column < owned - 1)", "column < owned)"),
    gpu("silu_mul", "inside = column < size", "inside = column < size - 1", file="activation"),
    gpu(
        "rope_attention", "(own[None, :] <= token[:, None])", "(own[None, :] < token[:, None])", file="attention_steps"
    ),
    gpu("paged_attention", "reached = (row <= num_rows)", "reached = (row < num_rows)", file="attention"),
    gpu("commit", "gained = tl.minimum(given, max_len - before)", "gained = given"),
    gpu(
        "divide_logits",
        "tl.store(address, tl.div_rn(dividend, divisor",
        "tl.store(address, tl.div_rn(divisor, dividend",
    ),
    gpu("draft_rows", "tl.minimum(wanted, LIMIT - first)", "wanted"),
    gpu("embed", "mask=column < size)\n    tl.store", "mask=column < size - 1)\n    tl.store"),
    gpu("gather_rows", "at < known", "at <= known"),
    gpu("join_input", "inside = column < size", "inside = column < size - 1"),
    gpu("linear", "own = column < outputs", "own = column < outputs - 1"),
    gpu(
        "min_tokens_mask",
        "tl.load(position + row) < tl.load(min_length",
        "tl.load(position + row) <= tl.load(min_length",
    ),
    gpu("ngram_lookup", "unbroken & (copy_end > i)", "unbroken & (copy_end >= i)", file="ngram"),
    gpu("noise_bits", "mask=index < num_indices", "mask=index < num_indices - 1", file="noise"),
    gpu("rms_norm", "inside = column < size", "inside = column < size - 1", file="norm"),
    gpu("report", "* stride + column, token, mask=column < width", "* stride + column, token, mask=column < width - 1"),
    gpu("rope_store", "is_key = (head >= num_heads)", "is_key = (head > num_heads)", file="rope"),
    gpu("rope_attention", "< num_cached)[None, :]", "<= num_cached)[None, :]"),
    gpu("gumbel_argmax", "(0x7FFFFFFF - column)", "column", file="sample"),
    gpu("scale_hidden", "inside = column < size", "inside = column < size - 1"),
    gpu("single_rows", "mask=row <= num_requests", "mask=row < num_requests"),
    gpu("assemble", "known = real & (past < 0)", "known = real & (past <= 0)", file="step_inputs"),
    gpu("synthetic_accept", "start[None, :] <= item[:, None]", "start[None, :] < item[:, None]"),
    gpu("truncate", "digit > found", "digit >= found"),
    # edges of the CPU kernels
    cpu("accept_drafts", "while gained < owned - 1:", "while gained < owned:"),
    cpu("commit", "smaller(count[row], max_len - length[slot])", "count[row]"),
    cpu("draft_rows", "offset < accepted else num_query", "offset <= accepted else num_query"),
    cpu("gather_rows", "index[row] < known", "index[row] <= known"),
    cpu("linear", "smaller(start + share, outputs)", "smaller(start + share, outputs - 1)"),
    cpu("ngram_lookup", "run < longest and run < copy_end", "run < longest and run <= copy_end", file="ngram"),
    cpu(
        "paged_attention",
        "(first + part + i) // group + 1 - begin",
        "(first + part + i) // group - begin",
        file="attention_tasks",
    ),
    cpu(
        "paged_attention",
        "// _SPLIT + 1):",
        "// _SPLIT):",
        *op("paged_attention", "cpu"),
        "tests/test_kernels.py",
        file="attention_tasks",
    ),
    cpu("add_rms_norm", "if residual != 0:", "if residual == 0:", file="norm"),
    cpu(
        "rope_store",
        "offset = slots[token] // block_size, slots[token] % block_size",
        "offset = slots[token] // block_size, (slots[token] + 1) % block_size",
        file="rope",
    ),
    cpu("gumbel_argmax", "if block_max > best:", "if block_max >= best:", file="sample"),
    cpu("scale_hidden", "np.float32(1) if own[row] == 0", "np.float32(1) if own[row] != 0"),
    cpu("assemble", "if past < 0 or width == 0:", "if past <= 0 or width == 0:", file="step_inputs"),
    cpu("truncate", "while counts[bin_index] < k:", "while counts[bin_index] <= k:"),
    # rules of the engine: one per room
    Fault(
        "verify/rejection.py", "(target - guessed).clamp(min=0).log()", "target.log()", ("tests/test_verification.py",)
    ),
    Fault(
        "schedule/scheduler.py",
        "draft_limit or limit, limit - 1)",
        "draft_limit or limit, limit)",
        ("tests/test_scheduling.py",),
    ),
    Fault(
        "schedule/scheduler.py",
        "num_computed = len(request.tokens) + count - 1",
        "num_computed = len(request.tokens) + count",
        ("tests/test_scheduling.py",),
    ),
    Fault(
        "cache/prefix.py", "width = self.block_size + self.num_after", "width = self.block_size", ("tests/unit/cache",)
    ),
    Fault("cache/prefix.py", "parent: Parent = salt", 'parent: Parent = ""', ("tests/unit/cache",)),
    Fault(
        "draft/eagle/base.py",
        "return self.config.aux_layers(self.target.num_layers)",
        "return tuple(i - 1 for i in self.config.aux_layers(self.target.num_layers))",
        ("tests/test_heads.py",),
    ),
    Fault(
        "draft/eagle/peagle.py",
        "hidden = self.hidden(context, rows, self._mask_row)",
        "hidden = self.hidden(context, rows, self._mask_row * 0)",
        ("tests/test_heads.py",),
    ),
    Fault("acceptance/bands.py", "if low <= now <= high", "if now <= high", ("tests/test_bundled.py", "-k", "departs")),
)


def plant(fault: Fault, into: Path) -> None:
    """Copies the tree and replaces the text. ValueError if it does not stand in the file exactly once."""
    for name in ("src", "tests", "examples", "docs", "benchmarks", "recipes", "pyproject.toml", "README.md"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, symlinks=True)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, into / name)
    path = into / SOURCE / fault.file
    path.write_text(planted(fault), encoding="utf-8")


def planted(fault: Fault) -> str:
    """The file's text with the fault in it."""
    text = (ROOT / SOURCE / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} holds {fault.old!r} {text.count(fault.old)} times instead of once")
    return text.replace(fault.old, fault.new)


def caught(fault: Fault) -> bool:
    """Whether its tests fail, or end their process. RuntimeError, with their output, if they could not be run."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = Path(folder)
        plant(fault, tree)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", SELECTED, *fault.tests]
        environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(
            f"{fault.file}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-500:]}"
        )
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="plant only the faults whose file holds this text")
    chosen = [fault for fault in FAULTS if parser.parse_args().only in fault.file]
    missed = 0
    for fault in chosen:
        start = time.monotonic()
        found = caught(fault)
        missed += not found
        print(f"{'caught' if found else 'MISSED'}  {fault.file}: {fault.old!r} -> {fault.new!r}", end=" ")
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
