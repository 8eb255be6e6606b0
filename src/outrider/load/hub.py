"""Where a model's files are: a local directory, the bundled model, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from outrider.errors import CheckpointError

BUNDLED = Path(__file__).parent.parent / "bundled"
"""Package data: the model served when none is named, and the prompts it was never trained on."""

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is fetched from the hub: configuration, weights and tokenizer; no other weight format."""


def locate(model: str | None) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded (or found in the hub's cache).

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
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot fetch {model} from the Hugging Face hub: {first}") from error
