"""Where a model's files are: a local directory, the bundled model, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outrider.errors import CheckpointError

BUNDLED = Path(__file__).parent.parent / "bundled"
"""Package data: the model served when none is named, its draft heads, and the prompts it was never trained on."""

BUNDLED_HEADS = BUNDLED / "heads"
"""A directory for each method whose head comes with the bundled model, of the method's name."""

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is fetched of a model: configuration, weights and tokenizer; no other weight format."""

HEAD_FILES = ("*.json", "*.safetensors", "pytorch_model.bin")
"""What is fetched of a draft head; some are published in torch's pickled format, which is read without running it."""


def locate(model: str | None, files: Sequence[str] = FILES) -> Path:
    """The local directory of a checkpoint; a hub id's `files` are downloaded (or found in the hub's cache).

    None is the bundled model. Raises CheckpointError naming what was tried.
    """
    if model is None:
        return BUNDLED / "model"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"no model directory: {model}; give a local directory or a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot fetch {model} from the Hugging Face hub: {first}") from error
