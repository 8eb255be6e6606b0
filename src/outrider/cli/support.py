"""What serves what: each part, on each kind of device, by which runners; computed from what the code declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from outrider.capability import Feature, Part
from outrider.draft.host import HostDrafter
from outrider.draft.registry import METHODS
from outrider.models.registry import MODELS
from outrider.options import AUTO
from outrider.oracle import RefusedError, choose
from outrider.parallel.mesh import Mesh
from outrider.runner.base import Runner
from outrider.verify.base import Verifier
from outrider.verify.registry import PROCESSORS, VERIFIERS

DEVICES = (
    Part("GPU", frozenset({Feature.CUDA})),
    Part("GPU without Triton", frozenset({Feature.CUDA, Feature.WITHOUT_TRITON})),
    Part("GPU below 8.0", frozenset({Feature.CUDA, Feature.OLD_CUDA})),
    Part("CPU", frozenset({Feature.CPU})),
)
"""The kinds of device, by what the oracle sees of them."""

_INTRODUCTION = """\
# What runs where

`outrider explain --table` prints this page: parts declare what they need, runners what they offer. A test compares.
Each cell names the runners that serve a part on a device, the one that `auto` takes first, and by number why another
does not. A runner serves a whole configuration if it is in the cells of all its parts. `outrider explain` with the
flags of the configuration says which one serves it, and why.
"""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a runner is not in a cell."""

    runner: str
    feature: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One part on one device: the runners that serve it, fastest first, and why others do not."""

    part: str
    device: str
    runners: tuple[str, ...]
    reasons: tuple[Reason, ...]


def parts() -> Iterator[Part]:
    """All that a configuration can be made of, a drafter in a user's own Python included, but its device."""
    yield from (model.part() for model in MODELS.values())
    yield from (drafter.part() for drafter in METHODS.values())
    yield Part("drafter in plain Python (`HostDrafter`)", HostDrafter.needs)
    yield from (Part(f"verifier {name}", cast(type[Verifier], made_by).needs) for name, made_by in VERIFIERS.items())
    yield from (Part(f"processor {processor.name}", processor.needs) for processor in PROCESSORS)
    yield from (*Mesh(tensor=2).parts(), *Mesh(pipeline=2).parts())


def support(runners: Sequence[type[Runner]]) -> list[Cell]:
    """Every part on every device, row by row, as the oracle would place it."""
    return [_cell(runners, part, device) for part in parts() for device in DEVICES]


def _cell(runners: Sequence[type[Runner]], part: Part, device: Part) -> Cell:
    serving: list[str] = []
    reasons: list[Reason] = []
    for runner in runners:
        try:
            serving.append(choose([runner], [device, part], AUTO).runner.name)
        except RefusedError as refusal:
            reasons += [Reason(one["runner"], one["feature"], one["reason"]) for one in refusal.to_list()]
    return Cell(part.name, device.name, tuple(serving), tuple(reasons))


def to_markdown(cells: Sequence[Cell]) -> str:
    """The page."""
    notes = list(dict.fromkeys(reason for cell in cells for reason in cell.reasons))
    rows: dict[str, list[str]] = {}
    for cell in cells:
        marks = "".join(f"[^{notes.index(reason) + 1}]" for reason in dict.fromkeys(cell.reasons))
        rows.setdefault(cell.part, []).append(f"{', '.join(cell.runners) or 'refused'} {marks}".strip())
    heading = ["part", *(device.name for device in DEVICES)]
    lines = [heading, ["---"] * len(heading), *([part, *row] for part, row in rows.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footnotes = "\n".join(
        f"[^{number}]: runner {note.runner} lacks {note.feature}: {note.reason}."
        for number, note in enumerate(notes, start=1)
    )
    return f"{_INTRODUCTION}\n{table}\n\n{footnotes}\n"


def to_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The same for scripts."""
    return [
        {
            "part": cell.part,
            "device": cell.device,
            "runners": list(cell.runners),
            "passed_over": [
                {"runner": reason.runner, "feature": reason.feature, "reason": reason.reason} for reason in cell.reasons
            ],
        }
        for cell in cells
    ]
