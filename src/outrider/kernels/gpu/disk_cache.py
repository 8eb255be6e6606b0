"""Where Triton keeps compiled kernels: a temporary directory, where the usual one cannot be written."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

logger = logging.getLogger("outrider")


def writable(directory: str) -> str:
    """The directory if files can be made in it; else a temporary one, with a warning.

    The temporary one is deleted at exit.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        made = tempfile.mkdtemp(prefix="outrider-triton-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        logger.warning(
            "Triton's cache %s cannot be written, and each process compiles its kernels again (%s): set "
            "TRITON_CACHE_DIR to a directory that can",
            directory,
            error,
        )
        return made
    return directory
