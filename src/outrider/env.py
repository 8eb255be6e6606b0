"""The only reader of os.environ. Every variable outrider looks at is listed here."""

from __future__ import annotations

import os

RUNNER = "OUTRIDER_RUNNER"
"""Runner to use where the `runner` option is "auto"."""


def runner() -> str | None:
    """The runner named in the environment, if any."""
    return os.environ.get(RUNNER) or None
