"""A checkpoint's directory: its config, its tensors by name, and streaming them into parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.core.reading import written_short
from outrider.errors import CheckpointError, shortened
from outrider.layers.weight import WeightSlot

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = "pytorch_model.bin"

_DTYPES = {
    "BOOL": torch.bool,
    **{f"I{size}": getattr(torch, f"int{size}") for size in (8, 16, 32, 64)},
    **{f"U{size}": getattr(torch, f"uint{size}") for size in (8, 16, 32, 64)},
    **{f"F{size}": getattr(torch, f"float{size}") for size in (16, 32, 64)},
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types as the header of a safetensors file names them."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint, or CheckpointError naming the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"missing file: {path}") from None
    except RecursionError:
        raise CheckpointError(f"cannot read {path}: it is nested too deeply; is it a config?") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"cannot read {path}: no UTF-8 from byte {error.start} on; save it as UTF-8") from None
    # not JSON, not UTF-8, or a number of more digits than Python reads
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"not a JSON object: {path}")
    return loaded


def weight_files(directory: Path, *, pickled: bool = False) -> list[Path]:
    """The safetensors files of a checkpoint, from its index if it is sharded.

    `pickled`: a single `pytorch_model.bin` will do where there are none, as for draft heads published that way.
    """
    single, index = directory / SINGLE, directory / INDEX
    if pickled and (directory / PICKLED).exists() and not single.exists() and not index.exists():
        return [directory / PICKLED]
    files = [single]
    if index.exists():
        listed = sorted(set(_weight_map(index).values()))
        # a file that the index does not know is a whole checkpoint: transformers takes it first
        if not single.exists() or SINGLE in listed:
            files = [directory / name for name in listed]
    absent = [str(file) for file in files if not file.exists()]
    if absent or not files:
        other = next(directory.glob("*.bin"), None)
        remedy = f"; convert {other.name} to safetensors" if other else ""
        raise CheckpointError(f"missing weight file: {', '.join(absent) or directory / SINGLE}{remedy}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. CheckpointError for an index that maps to what is no file below its directory."""
    shards = read_json(index).get("weight_map", {})
    if not isinstance(shards, dict):
        raise CheckpointError(f"{index}: weight_map must map names to files: {written_short(shards)}")
    for name, file in shards.items():
        path = PurePosixPath(file) if isinstance(file, str) else None
        if path is None or path.is_absolute() or ".." in path.parts or "\0" in file or path.suffix != ".safetensors":
            raise CheckpointError(
                f"{index}: weight_map must map names to .safetensors files beside it, and {shortened(name)} is in "
                f"{written_short(file)}: correct it there"
            )
    return shards


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor. Shape and type are None if only the index is there and not the file."""

    file: Path
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None  # None too for a type that torch does not have


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a config.json and weights. Whoever is given a directory opens it once and hands this down."""

    directory: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads config.json, no weights. CheckpointError if it is missing or not a JSON object."""
        return cls(directory, read_json(directory / "config.json"))

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name in the files; reads headers only, at the first use.

        If the files named by an index are all absent, the names come from the index alone: such a checkpoint can be
        described, and run with random weights. CheckpointError if a file is missing or truncated.
        """
        index = self.directory / INDEX
        shards = _weight_map(index) if index.exists() else {}
        files = {name: self.directory / file for name, file in shards.items()}
        if files and not any(file.exists() for file in files.values()):
            return {name: TensorInfo(file, None, None) for name, file in files.items()}
        found: dict[str, TensorInfo] = {}
        for file in weight_files(self.directory, pickled=True):
            found |= TensorFile(file).describe()
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. CheckpointError if there is none of this name."""
        if name not in self.tensors:
            raise CheckpointError(f"checkpoint {self.directory} lacks {name}")
        return TensorFile(self.tensors[name].file).read(name)

    def summary(self) -> str:
        """What it holds, in a line for a message: architectures, types and some names of tensors."""
        config = self.config
        keys = ("architectures", "model_type", "speculators_model_type")
        said = [f"{key} {config[key]}" for key in keys if config.get(key)]
        return f"{', '.join(said) or 'a config.json that names no architecture'}; tensors {some(sorted(self.tensors))}"


def _named_tensors(loaded: Any, file: Path) -> dict[str, Tensor]:
    """What a pickled file holds. CheckpointError for what is no tensor by its name."""
    if not isinstance(loaded, dict):
        raise CheckpointError(f"cannot read {file}: it must hold tensors by their names: a {type(loaded).__name__}")
    for name, held in loaded.items():
        if not isinstance(name, str) or not isinstance(held, Tensor) or held.layout != torch.strided:
            what = "no name"
            if isinstance(name, str):
                what = f"a tensor of layout {held.layout}" if isinstance(held, Tensor) else f"a {type(held).__name__}"
            raise CheckpointError(
                f"cannot read {file}: it must hold plain tensors by their names, and {written_short(name)} is {what}"
            )
    return loaded


class TensorFile:
    """The tensors of one weight file by name. Only those asked for are read. Raises CheckpointError if it cannot be."""

    def __init__(self, file: Path) -> None:
        self.file = file
        loaded: Any = None
        try:
            if file.suffix == ".bin":
                loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            else:
                self._opened: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError, RuntimeError, UnpicklingError, EOFError, ValueError, TypeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"cannot read {file}: {first}; is it complete?") from error
        self._tensors = _named_tensors(loaded, file) if file.suffix == ".bin" else None

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._opened.keys() if self._tensors is None else self._tensors)

    def describe(self) -> dict[str, TensorInfo]:
        """Shape and type of every tensor; no tensor is read."""
        if self._tensors is not None:
            return {name: TensorInfo(self.file, tuple(held.shape), held.dtype) for name, held in self._tensors.items()}
        slices = {name: self._opened.get_slice(name) for name in self.names()}
        return {
            name: TensorInfo(self.file, tuple(held.get_shape()), _DTYPES.get(held.get_dtype()))
            for name, held in slices.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor."""
        try:
            tensor: Tensor = self._opened.get_tensor(name) if self._tensors is None else self._tensors[name]
            return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {self.file}: {error}; is it complete?") from error


def fingerprint(directory: Path) -> str:
    """Tells one checkpoint from another by its config and the size and first MiB of each weight file."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in weight_files(directory, pickled=True):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()[:16]


def load_weights(
    directory: Path,
    slots: Mapping[str, WeightSlot],  # checkpoint name -> what it fills
    ignores: Callable[[str], bool] = lambda name: False,  # names the checkpoint may hold that nothing reads
    progress: Callable[[int], None] | None = None,  # called with the bytes of each tensor as it is filled
    rename: Callable[[str], str] = lambda name: name,  # from the file's name to the one in `slots`
    pickled: bool = False,  # as `weight_files` takes it
) -> None:
    """Fills every parameter from the checkpoint, one tensor in memory at a time, casting as needed.

    Raises CheckpointError listing the names that the checkpoint lacks, that the model does not
    have, or whose shapes differ. Nothing is left half loaded in silence.
    """
    filled: set[str] = set()
    unexpected: list[str] = []
    with torch.no_grad():
        for file in weight_files(directory, pickled=pickled):
            shard = TensorFile(file)
            for given in shard.names():
                name = rename(given)
                if name in filled:
                    raise CheckpointError(f"{file} holds {name} twice, once as {given}")
                if name in slots:
                    _fill(slots[name], shard.read(given), given, file)
                    filled.add(name)
                    if progress:
                        progress(slots[name].nbytes)
                elif not ignores(name):
                    unexpected.append(given)
    missing = sorted(set(slots) - filled)
    if missing or unexpected:
        complaints = [f"lacks {some(missing)}"] if missing else []
        complaints += [f"holds weights the model does not have: {some(sorted(unexpected))}"] if unexpected else []
        raise CheckpointError(f"checkpoint {directory} {' and '.join(complaints)}")


def _fill(slot: WeightSlot, tensor: Tensor, name: str, file: Path) -> None:
    try:
        slot.fill(tensor)
    except CheckpointError as error:
        raise CheckpointError(f"{name} in {file} {error}") from None


def some(names: list[str], count: int = 8) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
