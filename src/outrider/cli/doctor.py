"""`outrider doctor`: versions, devices, caches, and what is missing with the command that gets it."""

from __future__ import annotations

import os
import platform
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape

from outrider import __version__, env
from outrider.cli.common import Json, out, print_json, starting
from outrider.core.sizes import MIB

NEEDED_FOR = (
    ("fastapi", "fastapi", "outrider serve"),
    ("uvicorn", "uvicorn", "outrider serve"),
    ("msgspec", "msgspec", "outrider serve"),
    ("prometheus_client", "prometheus-client", "outrider serve"),
    ("zmq", "pyzmq", "outrider serve"),
    ("httptools", "httptools", "a faster outrider serve"),
    ("uvloop", "uvloop", "a faster outrider serve"),
    ("opentelemetry.sdk", "opentelemetry-sdk", "--otlp-traces-endpoint"),
    ("opentelemetry.exporter", "opentelemetry-exporter-otlp-proto-http", "--otlp-traces-endpoint"),
)
"""Modules that a part of outrider imports, the package that brings each, and the part."""


def doctor(as_json: Json = False) -> None:
    """Say what is installed, which devices there are, where caches lie, and what is missing."""
    with starting():
        found = examine()
    if as_json:
        print_json(found)
    else:
        _print(found)


def examine() -> dict[str, Any]:
    """All of it, as `--json` prints it."""
    import torch

    from outrider.bench.provenance import provenance

    of = provenance(torch.device("cpu"))
    return {
        "outrider": {"version": __version__, "directory": str(Path(__file__).parent.parent), "commit": of["commit"]},
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "python": sys.executable,
        "versions": {name: version for name, version in of["versions"].items() if name not in ("python", "outrider")},
        "devices": [{"device": "cpu", "name": of["device"], **_host_memory()}, *_gpus()],
        "caches": [_described(what, directory) for what, directory in _caches()],
        "missing": list(_missing(torch.cuda.is_available())),
    }


def _host_memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"memory": memory.total, "free": memory.available}


def _gpus() -> Iterator[dict[str, Any]]:
    import torch

    from outrider.kernels.op import triton_serves

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        yield {
            "device": str(device),
            "name": torch.cuda.get_device_name(device),
            "memory": total,
            "free": free,
            "capability": f"{major}.{minor}",
            "kernels": triton_serves(device),
        }


def _caches() -> Iterator[tuple[str, Path | None]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from outrider.kernels.cpu import norm  # noqa: F401  any file of kernels: all keep their code in one directory
    from outrider.kernels.cpu.jit import ENTRIES

    directory = next(iter(ENTRIES.values())).directory
    yield "compiled CPU kernels", None if directory is None else Path(directory)
    yield "tokenizers", env.cache_directory() / "tokenizers"
    yield "models from Hugging Face", Path(HF_HUB_CACHE)


def _described(what: str, directory: Path | None) -> dict[str, Any]:
    if directory is None:
        return {"what": what, "directory": None, "bytes": 0, "writable": False}
    exists = next(parent for parent in (directory, *directory.parents) if os.path.exists(parent))
    return {
        "what": what,
        "directory": str(directory),
        "bytes": sum(_sizes(directory)),
        "writable": os.path.isdir(exists) and os.access(exists, os.W_OK),
    }


def _sizes(directory: Path) -> Iterator[int]:
    """Of the files below, as far as this user may look, and without what another process deletes meanwhile."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(found.st_mode):
                    yield found.st_size


def _missing(has_gpu: bool) -> Iterator[dict[str, str]]:
    gpu = (("triton", "triton", "the kernels of a GPU"),) if has_gpu else ()
    for module, package, purpose in (*NEEDED_FOR, *gpu):
        if not _installed(module):
            yield {"package": package, "for": purpose, "get": f"{sys.executable} -m pip install {package}"}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor the package that it is in
        return False


def _print(found: dict[str, Any]) -> None:
    of = found["outrider"]
    commit = f", commit {of['commit']}" if of["commit"] else ""
    out.print(f"[bold]outrider {of['version']}[/] in {escape(of['directory'])}{commit}")
    out.print(f"{found['platform']}, {escape(found['python'])}")
    out.print(", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))
    out.print("\n[bold]devices[/]")
    for one in found["devices"]:
        more = f", compute capability {one['capability']}" if "capability" in one else ""
        out.print(f"  {one['device']}: {one['name']}{more}")
        out.print(f"    {one['memory'] / MIB:,.0f} MiB, of which {one['free'] / MIB:,.0f} are free")
        if not one.get("kernels", True):
            out.print("    [yellow]no Triton kernels run on it: it takes the slower references in torch[/]")
    out.print("\n[bold]caches[/]")
    for cache in found["caches"]:
        out.print(f"  {cache['what']}: {escape(str(cache['directory']))}, {cache['bytes'] / MIB:,.1f} MiB")
        if not cache["writable"]:
            out.print("    [yellow]it cannot be written: what it would keep is made again at each start[/]")
    out.print("\n[bold]missing[/]" if found["missing"] else "\nnothing is missing")
    for one in found["missing"]:
        out.print(f"  {one['package']}, for {one['for']}: {escape(one['get'])}")
