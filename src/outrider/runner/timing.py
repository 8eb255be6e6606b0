"""How long the parts of recorded steps took on the device."""

from __future__ import annotations

from outrider.runner.recorder import Marks

PARTS = ("inputs", "target", "verify", "draft")
START, END = "start", "end"
MARKS = (START, *PARTS, END)


class PartTimes:
    """Adds up the times between the marks of steps, and of the gap before each."""

    def __init__(self) -> None:
        self._last: Marks | None = None  # of the step read last
        self._start_over()

    def _start_over(self) -> None:
        self._spent = dict.fromkeys((*PARTS, "gap"), 0.0)
        self._num_steps = self._num_gaps = 0

    def add(self, marks: Marks) -> None:
        """Takes the times of a step that is over."""
        for part, before in zip(PARTS, MARKS, strict=False):
            self._spent[part] += marks.milliseconds(before, marks, part)
        if self._last is not None and self._last is not marks:
            self._spent["gap"] += self._last.milliseconds(END, marks, START)
            self._num_gaps += 1
        self._last = marks
        self._num_steps += 1

    def skip_gap(self) -> None:
        """The gap before the next step holds other work, so it is not counted."""
        self._last = None

    def means(self) -> dict[str, float]:
        """Mean milliseconds of each part, and of the gap, since the last call."""
        counts = dict.fromkeys(PARTS, self._num_steps) | {"gap": self._num_gaps}
        means = {part: spent / max(counts[part], 1) for part, spent in self._spent.items()}
        self._start_over()
        return means
