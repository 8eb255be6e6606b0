"""The acceptance on record beside a draft head: what was measured, and the setting it was measured in.

A head, and the bundled model for methods without one, comes with an `acceptance.json`: one record for each setting that
was measured. `outrider accept` compares a run with the record of its own setting; the engine's watchdog holds the
traffic it serves against the one nearest to it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from outrider.core.option import wrong_types
from outrider.core.output import AcceptanceReport
from outrider.errors import CheckpointError

RECORDS = "acceptance.json"
"""The file beside a head's weights that holds its records."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What acceptance was measured on: with any of it different, figures do not compare."""

    model: str  # fingerprint of the target's checkpoint
    head: str | None  # fingerprint of the draft head's; None: the method has none
    dtype: str
    method: str
    draft_options: dict[str, Any]  # options given to the method; one that is None is left out
    verifier: str
    prompts: str  # hash of the prompt set
    max_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.draft_options.items() if value is not None}
        object.__setattr__(self, "draft_options", given)

    @property
    def num_drafts(self) -> int:
        """K: the maximum of tokens drafted a round."""
        return int(self.draft_options["num_speculative_tokens"])


@dataclass(frozen=True, slots=True)
class Expectation:
    """Acceptance as it was recorded, and what it was recorded on."""

    setting: Setting
    drafts: int
    rates: tuple[float, ...]
    acceptance_length: float
    tolerance: float = 0.02  # relative, on each rate and each ratio

    @classmethod
    def of(cls, setting: Setting, report: AcceptanceReport) -> Expectation:
        """What a run measured, as what later ones are held to."""
        return cls(setting, report.drafts, report.rates, report.length)

    @classmethod
    def from_dict(cls, given: Any) -> Expectation:
        """One record of an acceptance.json. ValueError, saying what is wrong, if it is none."""
        try:
            recorded = cls(**{**given, "setting": Setting(**given["setting"]), "rates": tuple(given["rates"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        for record in (recorded.setting, recorded):
            for name, value, wanted in wrong_types(record):
                raise ValueError(f"{name} must be {wanted}: {value!r}")
        width = recorded.setting.draft_options.get("num_speculative_tokens")
        if len(recorded.rates) != width:
            raise ValueError(f"it holds {len(recorded.rates)} rates for {width} drafts a round")
        if not all(0.0 <= rate <= 1.0 for rate in recorded.rates) or recorded.drafts < 1 or recorded.tolerance < 0:
            raise ValueError(f"rates, drafts or tolerance are out of range: {given}")
        return recorded

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each rate over the one before it."""
        pairs = zip(self.rates, self.rates[1:], strict=False)
        return tuple(after / before if before else 0.0 for before, after in pairs)


def read_records(path: Path) -> list[Expectation]:
    """Every record of an acceptance.json. CheckpointError, naming the file, if it is missing or not one."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    entries = given.get("records") if isinstance(given, Mapping) else None
    if not isinstance(entries, list):
        raise CheckpointError(f'not an acceptance record: {path}: it must hold {{"records": [...]}}')
    records: list[Expectation] = []
    for number, entry in enumerate(entries, start=1):
        try:
            record = Expectation.from_dict(entry)
        except ValueError as error:
            raise CheckpointError(f"not an acceptance record: {path}, record {number}: {error}") from error
        if find(records, record.setting):
            raise CheckpointError(f"{path} records one setting twice: record {number} repeats an earlier one")
        records.append(record)
    return records


def write_record(path: Path, record: Expectation) -> None:
    """Puts a record into an acceptance.json, replacing the one of the same setting; other records stay.

    The file is replaced whole: CheckpointError if it cannot be written, and then it is as it was.
    """
    records = read_records(path) if path.exists() else []
    found = find(records, record.setting)
    if found is None:
        records.append(record)
    else:
        records[records.index(found)] = record
    text = json.dumps({"records": [asdict(entry) for entry in records]}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; the records there are as they were") from error


def _replace(path: Path, text: str) -> None:
    """Writes a file beside it, and puts that in its place once all of it is on the disk."""
    target = path.resolve()  # a link stays one
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    written = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read
        written.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        written.replace(target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def find(records: Sequence[Expectation], setting: Setting) -> Expectation | None:
    """The record of exactly this setting."""
    return next((record for record in records if record.setting == setting), None)


def mismatches(recorded: Setting, measured: Setting) -> list[str]:
    """What makes a comparison meaningless, a line each."""
    names = [entry.name for entry in fields(Setting)]
    pairs = [(name, getattr(recorded, name), getattr(measured, name)) for name in names]
    return [f"{name} is {now}, recorded with {then}" for name, then, now in pairs if then != now]


def why_not_found(records: Sequence[Expectation], setting: Setting) -> list[str]:
    """How the record nearest to a setting differs from it; nothing if it is there."""
    differing = [mismatches(record.setting, setting) for record in records]
    return min(differing, key=len) if differing else ["nothing is recorded"]
