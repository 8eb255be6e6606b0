"""Where compiled CPU kernels are kept: a cache on disk that may be missing, full or damaged at no cost but time."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache, UserWideCacheLocator
from numba.core.serialize import dumps

logger = logging.getLogger("outrider")

_DIGEST = sha256().digest_size
_FORMAT = "sealed"
"""Part of the files' names, so that files of numba's own format are not read."""


class DiskCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function. What cannot be read is compiled; what cannot be written is not kept."""

    def __init__(self, function: Callable[..., Any], stamp: str) -> None:
        """`stamp`: of the source; what another one is on is stale. RuntimeError if no directory can be written."""
        super().__init__(function)
        self._cache_file = _SealedFile(self._cache_path, f"{self._impl.filename_base}.{_FORMAT}", stamp)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled function; None if it is not there, or damaged."""
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:
            _warn(
                f"compiled kernels in {self.cache_path} cannot be read, and are compiled again ({_said(error)}): if "
                "this comes again, delete that directory's .nbi and .nbc files, or set NUMBA_CACHE_DIR to another one"
            )
        try:
            self.flush()  # or saving would read the index again
        except OSError:
            self.disable()
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keeps a compiled function, if that can be."""
        try:
            super().save_overload(signature, result)
        except Exception as error:
            self.disable()
            _warn(
                f"compiled kernels cannot be kept in {self.cache_path}, and each process compiles them again "
                f"({_said(error)}): make room there, or set NUMBA_CACHE_DIR to a directory that can be written"
            )


def cache_of(function: Callable[..., Any], stamp: str) -> DiskCache | NullCache:
    """The function's cache; one that keeps nothing if no directory can be written."""
    try:
        return DiskCache(function, stamp)
    except (OSError, RuntimeError) as error:
        given = [config.CACHE_DIR] if config.CACHE_DIR else []
        beside = Path(function.__code__.co_filename).parent / "__pycache__"
        of_user = UserWideCacheLocator(function, function.__code__.co_filename).get_cache_path()
        tried = ", ".join(str(path) for path in (*given, beside, of_user))
        _warn(
            f"no directory for compiled kernels can be written ({tried}), and each process compiles them again "
            f"({_said(error)}): set NUMBA_CACHE_DIR to a directory that can"
        )
        return NullCache()


class _SealedFile(IndexDataCacheFile):  # type: ignore[misc]
    """Files that end with a digest of the rest: damaged machine code must not be run."""

    def _load_index(self) -> dict[Any, str]:
        try:
            version, stamp, overloads = _opened(Path(self._index_path))
        except FileNotFoundError:
            return {}
        fresh = (version, stamp) == (self._version, self._source_stamp)
        return dict(overloads) if fresh else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        with self._open_for_write(self._index_path) as file:
            file.write(_sealed((self._version, self._source_stamp, overloads)))

    def _load_data(self, name: str) -> Any:
        return _opened(Path(self._data_path(name)))

    def _save_data(self, name: str, data: Any) -> None:
        with self._open_for_write(self._data_path(name)) as file:
            file.write(_sealed(data))


def _sealed(value: Any) -> bytes:
    written: bytes = dumps(value)
    return written + sha256(written).digest()


def _opened(path: Path) -> Any:
    written = path.read_bytes()
    if sha256(written[:-_DIGEST]).digest() != written[-_DIGEST:]:
        raise ValueError(f"{path.name} is damaged")
    return pickle.loads(written[:-_DIGEST])


def _said(error: Exception) -> str:
    return str(error) or repr(error)


_warned: list[str] = []


def _warn(message: str) -> None:
    """Once: every other kernel would say the same."""
    if not _warned:
        _warned.append(message)
        logger.warning("%s", message)
