"""The setting of a configuration, and the file that holds its record."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from outrider.acceptance.records import RECORDS, Setting
from outrider.config import Resolved
from outrider.load.checkpoint import fingerprint
from outrider.load.hub import BUNDLED

RANDOM_WEIGHTS = "random weights"
"""The fingerprint where nothing was read."""


def head_directory(resolved: Resolved) -> Path | None:
    """Where the draft head's checkpoint is; None if the method has none."""
    checkpoint = resolved.runner.draft_options.checkpoint
    return None if checkpoint is None else checkpoint.directory


def record_file(resolved: Resolved) -> Path | None:
    """The file of this configuration's record: beside the head, or the bundled model's.

    The file need not exist. None: a model of the user's own and a method without weights.
    """
    head = head_directory(resolved)
    if head is not None:
        return head / RECORDS
    return BUNDLED / "acceptance" / f"{resolved.method}.json" if resolved.options.model is None else None


def setting_of(resolved: Resolved, *, prompts: str = "", max_tokens: int = 0, temperature: float = 0.0) -> Setting:
    """The setting of a run. CheckpointError if a checkpoint is not there any more."""
    runner, head = resolved.runner, head_directory(resolved)
    loads = runner.directory is not None
    options = runner.draft_options
    return Setting(
        model=fingerprint(resolved.directory) if loads else RANDOM_WEIGHTS,
        head=None if head is None else fingerprint(head) if loads else RANDOM_WEIGHTS,
        dtype=str(runner.dtype).removeprefix("torch."),
        method=runner.drafter.name,
        draft_options={entry.name: getattr(options, entry.name) for entry in fields(options) if entry.compare},
        verifier=runner.verifier.name,
        prompts=prompts,
        max_tokens=max_tokens,
        temperature=temperature,
    )
