r"""Writes the bundled model's training tokens as JSONL that `outrider train --data` reads.

    python recipes/bundled_heads/tokens.py --data .bundle --out /tmp/heads --tokens 50000000

OUT receives train.jsonl (source and chat documents, drawn in the proportion they have) and validation.jsonl.
"""

from __future__ import annotations

import argparse
import lzma
import random
from pathlib import Path

import numpy as np

EOS = 0


def documents(folder: Path, split: str) -> list[np.ndarray]:
    """The documents of one split, each with its closing end-of-text token."""
    blocks = [lzma.decompress(path.read_bytes()) for path in sorted(folder.glob(f"{split}.*.xz"))]
    tokens = np.concatenate([np.frombuffer(block, dtype=np.uint16) for block in blocks])
    return np.split(tokens, np.flatnonzero(tokens == EOS)[:-1] + 1)


def write(path: Path, chosen: list[np.ndarray]) -> None:
    """One document a line."""
    with open(path, "w") as file:
        for document in chosen:
            file.write('{"token_ids": [' + ",".join(map(str, document.tolist())) + "]}\n")
    print(f"{path}: {len(chosen)} documents, {sum(map(len, chosen)):,} tokens")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".bundle"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of training text, at most")
    parser.add_argument("--validation-tokens", type=int, default=400_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, splits, most in (
        ("train", ("train", "chat"), options.tokens),
        ("validation", ("validation",), options.validation_tokens),
    ):
        found = [document for split in splits for document in documents(options.data, split)]
        random.Random(0).shuffle(found)
        reached = np.cumsum([len(document) for document in found])
        write(options.out / f"{name}.jsonl", found[: int(np.searchsorted(reached, most)) + 1])


if __name__ == "__main__":
    main()
