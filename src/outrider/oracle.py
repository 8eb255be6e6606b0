"""Decides which runner serves a configuration, and says why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.capability import Gap, Part
from outrider.errors import OptionError, UnsupportedError, nearest
from outrider.layers.backend import LayerChoice
from outrider.options import AUTO
from outrider.runner.base import Runner


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A runner that was not taken, and every reason."""

    runner: str
    gaps: tuple[Gap, ...]

    def to_list(self) -> list[dict[str, str]]:
        """One entry a reason: runner, part, feature, reason."""
        return [
            {"runner": self.runner, "part": gap.part, "feature": gap.feature.name.lower(), "reason": gap.reason}
            for gap in self.gaps
        ]


@dataclass(frozen=True, slots=True)
class Choice:
    """The oracle's verdict."""

    runner: type[Runner]
    passed_over: tuple[PassedOver, ...] = ()
    forced: bool = False
    layers: LayerChoice | None = None  # what runs the model's layers; None: not asked yet
    draft_layers: LayerChoice | None = None  # the same for the drafter's; None: it has none
    distributed_executor_backend: str = "uni"  # what hosts the runner, as the options say

    def to_dict(self) -> Mapping[str, Any]:
        """The verdict as `explain --json` prints it."""
        return {
            "runner": self.runner.name,
            "forced": self.forced,
            "distributed_executor_backend": self.distributed_executor_backend,
            "passed_over": [entry for runner in self.passed_over for entry in runner.to_list()],
            "layers": self.layers and self.layers.to_dict(),
            "draft_layers": self.draft_layers and self.draft_layers.to_dict(),
        }


class RefusedError(UnsupportedError):
    """No runner, or not the one asked for, serves the configuration."""

    def __init__(self, asked: str, refused: Sequence[PassedOver], able: Sequence[str]) -> None:
        """`asked`: the runner asked for, and by whom; `able`: those that lack nothing, none of them asked for."""
        self.refused, self.able = tuple(refused), tuple(able)
        who = f"runner {asked} cannot serve" if able else "no runner serves"
        lines = [f"runner {entry.runner}: {gap}" for entry in refused for gap in entry.gaps]
        lines += [f"runner {name} lacks nothing: ask for it, or for {AUTO}" for name in able]
        super().__init__(f"{who} this configuration\n  " + "\n  ".join(lines))

    def to_list(self) -> list[dict[str, str]]:
        """The reasons as `explain --json` prints them under `refused`."""
        return [reason for entry in self.refused for reason in entry.to_list()]


def choose(
    runners: Sequence[type[Runner]], parts: Iterable[Part], wanted: str = AUTO, wanted_by: str | None = None
) -> Choice:
    """The first runner, fastest first, that lacks nothing the parts need.

    A runner asked for by name is taken or refused, never replaced. Raises RefusedError with
    every reason of every runner at once, OptionError for a name that no runner has; `wanted_by`: where the
    name stands, if not in the option, for their messages.
    """
    asked = wanted if wanted_by is None else f"{wanted}, from {wanted_by},"
    names = {runner.name: runner for runner in runners}
    if wanted != AUTO and wanted not in names:
        raise OptionError(f"unknown runner: {asked} ({nearest(wanted, [AUTO, *names])})")
    parts = tuple(parts)
    passed_over: list[PassedOver] = []
    able: list[type[Runner]] = []
    for runner in runners:
        gaps = tuple(gap for part in parts for gap in runner.offer.gaps(part))
        if gaps:
            passed_over.append(PassedOver(runner.name, gaps))
        else:
            able.append(runner)
    taken = next((runner for runner in able if wanted in (AUTO, runner.name)), None)
    if taken is None:
        raise RefusedError(asked, passed_over, [runner.name for runner in able])
    faster = {runner.name for runner in runners[: list(runners).index(taken)]}
    return Choice(taken, tuple(entry for entry in passed_over if entry.runner in faster), forced=wanted != AUTO)
