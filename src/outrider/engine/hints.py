"""Fields that requests may bring and on which nothing depends: each is named once in the log."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("outrider")


@cache
def note_hint(name: str, why: str = "it changes nothing here, and is kept nowhere") -> None:
    """Says once in the life of the process that a field is taken, and why nothing follows from it."""
    logger.info("%s is taken: %s", name, why)
