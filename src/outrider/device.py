"""The device of an engine: finding it by name, its features, and its free memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from outrider.capability import Feature, Part
from outrider.errors import OptionError
from outrider.kernels import op

CGROUP = Path("/sys/fs/cgroup")


def find_device(name: str) -> torch.device:
    """The device that an option names; "auto" is a GPU where there is one. OptionError for one that cannot be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"unknown device: {name} (known: auto, cpu, cuda, cuda:N)") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device is not supported: {name} (known: auto, cpu, cuda, cuda:N)")
    if device.type == "cuda" and torch.version.hip is not None:
        raise OptionError(f"device is not supported: {name} of ROCm; take cpu, or a CUDA device and its torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"no such device: {name}; torch sees {torch.cuda.device_count()} CUDA devices: "
            "name one of them, or take auto or cpu"
        )
    return device


def device_part(device: torch.device) -> Part:
    """The device as the oracle sees it: its kind, and what is special about this one."""
    name = f"device {device}"
    if device.type == "cpu":
        return Part(name, frozenset({Feature.CPU}))
    needs = {Feature.CUDA}
    capability = torch.cuda.get_device_capability(device)
    if capability < op.MIN_CAPABILITY:
        name = "{} of compute capability {}.{}".format(name, *capability)
        needs.add(Feature.OLD_CUDA)
    if not op.HAS_TRITON:
        needs.add(Feature.WITHOUT_TRITON)
    return Part(name, frozenset(needs))


def free_memory(device: torch.device) -> int:
    """Bytes that a program could take on the device now; on a host, within its container's limit."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return int(min(available, _container_room()))


def _container_room() -> float:
    """What a cgroup (version 2) leaves; infinite where there is none."""
    try:
        limit, used = (CGROUP / "memory.max").read_text().strip(), (CGROUP / "memory.current").read_text()
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used)
