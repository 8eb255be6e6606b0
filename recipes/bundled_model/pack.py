"""Turns the splits into uint16 token blocks, compressed with xz, and copies what else the GPU machine needs.

    python pack.py --work DIR --out .bundle --train-tokens N

Every document ends with `<|endoftext|>`. A block is one xz stream, so that blocks decompress in parallel.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import shutil
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 28, "lp": 1, "lc": 0, "pb": 1}
LIMIT = 52 * 2**20


def encode(job: tuple[str, list[str]]) -> np.ndarray:
    """The tokens of some documents, each followed by the separator, which has the id 0."""
    tokenizer = Tokenizer.from_file(job[0])
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(job[1]):
        ids += encoding.ids
        ids.append(0)
    return np.array(ids, dtype=np.uint16)


def compress(job: tuple[np.ndarray, Path]) -> int:
    """Writes one block; returns its size in bytes."""
    data = lzma.compress(job[0].tobytes(), filters=[XZ])
    job[1].write_bytes(data)
    return len(data)


def tokens_of(texts: list[str], tokenizer: str) -> list[np.ndarray]:
    """The tokens of documents, in arrays of about a thousand documents."""
    with Pool() as pool:
        return pool.map(encode, [(tokenizer, texts[i : i + 1000]) for i in range(0, len(texts), 1000)], chunksize=1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bundle"))
    parser.add_argument("--out", type=Path, default=Path(".bundle"))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=1e9, help="size of the train text to keep")
    options = parser.parse_args()
    shutil.copytree(options.work / "tokenizer", options.out / "tokenizer", dirs_exist_ok=True)
    tokenizer = str(options.work / "tokenizer" / "tokenizer.json")
    figures: dict[str, dict[str, int]] = {}
    jobs = []
    for split in ("train", "chat", "validation", "heldout"):
        with open(options.work / f"{split}.jsonl") as file:
            texts = [json.loads(line)["text"] for line in file]
        if split == "train" and (share := options.megabytes * 1e6 / sum(map(len, texts))) < 1:
            chosen = set(random.Random(0).sample(range(len(texts)), int(share * len(texts))))
            texts = [text for index, text in enumerate(texts) if index in chosen]
        arrays = tokens_of(texts, tokenizer)
        size = sum(len(text.encode()) for text in texts)
        figures[split] = {"documents": len(texts), "bytes": size, "tokens": sum(map(len, arrays))}
        count = options.blocks if split == "train" else 1
        for part, index in enumerate(np.array_split(np.arange(len(arrays)), count)):
            jobs.append((np.concatenate([arrays[i] for i in index]), options.out / f"{split}.{part}.xz"))
    (options.out / "meta.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    with Pool() as pool:
        sizes = pool.map(compress, jobs, chunksize=1)
    total = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"blocks {sizes}, payload {total / 2**20:.2f} MiB")
    if total > LIMIT:
        raise SystemExit(f"the payload is over {LIMIT / 2**20} MiB: lower --megabytes")


if __name__ == "__main__":
    main()
