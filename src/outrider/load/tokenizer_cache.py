"""What transformers made of a checkpoint's tokenizer files, kept on disk for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outrider import env

logger = logging.getLogger("outrider")

READ_BY_TRANSFORMERS = ("*.json", "*.txt", "*.model", "*.tiktoken")
"""Files beside a checkpoint's weights that may say what its tokenizer is."""


@dataclass(frozen=True, slots=True)
class TokenizerCache:
    """The place of one checkpoint's tokenizer.

    Its name is a digest of the files' content and of the versions that read them, so a change makes another place.
    Where it cannot be read or written, transformers is asked as if there were no cache.
    """

    directory: Path
    file: Path

    @classmethod
    def of(cls, directory: Path) -> TokenizerCache:
        """The place for the tokenizer in a checkpoint's directory."""
        import tokenizers

        digest = hashlib.sha256(f"{directory}\0{tokenizers.__version__}\0{version('transformers')}".encode())
        for path in sorted({path for pattern in READ_BY_TRANSFORMERS for path in directory.glob(pattern)}):
            if path.is_file():
                content = path.read_bytes()
                digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
        return cls(directory, env.cache_directory() / "tokenizers" / f"{digest.hexdigest()}.json")

    def read(self) -> Any | None:
        """The `tokenizers.Tokenizer` that was kept; None if there is none."""
        import tokenizers

        try:
            kept = json.loads(self.file.read_text())
            written = kept["backend"]
            backend = _as_it_is(self.directory) if written is None else tokenizers.Tokenizer.from_str(written)
            backend.encode_special_tokens = kept["encode_special_tokens"]
        except FileNotFoundError:
            return None
        except Exception as error:  # tokenizers raises plain Exception for text that it cannot read
            logger.debug("tokenizer cache %s is not used: %s", self.file, error)
            return None
        return backend

    def write(self, backend: Any) -> None:
        """Keeps it; only a note if it is tokenizer.json as it is."""
        kept = {"backend": backend.to_str(), "encode_special_tokens": backend.encode_special_tokens}
        if (self.directory / "tokenizer.json").is_file() and _as_it_is(self.directory).to_str() == kept["backend"]:
            kept["backend"] = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # another process may read it: it appears whole or not at all
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as written:
                try:
                    json.dump(kept, written)
                    written.flush()
                    os.replace(written.name, self.file)
                finally:
                    Path(written.name).unlink(missing_ok=True)
        except OSError as error:
            logger.debug("tokenizer cache %s is not written: %s", self.file, error)


def _as_it_is(directory: Path) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend
