"""Text that the target itself writes after beginnings of documents, fast, by transformers on a GPU.

    python recipes/bundled_heads/write.py --data /tmp/heads/train.jsonl --out /tmp/heads/written.jsonl --minutes 2

The same lines as `outrider train --on-policy ... --generate-only` writes, by the million: prompts of one length at a
time, without padding. That transformers and the engine differ in the last bits spoils no draft.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.load.hub import BUNDLED

EOS = 0


def prompts(lines: list[str], newlines: set[int], length: int, count: int, draw: random.Random) -> torch.Tensor:
    """[count, length] pieces of documents up to the end of a line."""
    found = []
    while len(found) < count:
        tokens = json.loads(draw.choice(lines))["token_ids"]
        ends = [end for end in range(length, len(tokens)) if tokens[end - 1] in newlines]
        if ends:
            end = draw.choice(ends)
            found.append(tokens[end - length : end])
    return torch.tensor(found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 96, 128, 192, 256])
    parser.add_argument("--sampled-every", type=int, default=8, help="every so many batches one at temperature 0.8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.bfloat16).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model")
    newlines = {token for token in range(len(tokenizer)) if tokenizer.decode([token]).endswith("\n")}
    end = time.monotonic() + 60 * options.minutes
    written = batches = 0
    lines = options.data.read_text().splitlines()
    with open(options.out, "w") as file:
        while time.monotonic() < end:
            length = options.lengths[batches % len(options.lengths)]
            sampled = batches % options.sampled_every == options.sampled_every - 1
            asked = prompts(lines, newlines, length, options.batch, draw).to(options.device)
            how = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sampled else {"do_sample": False}
            with torch.inference_mode():
                found = model.generate(
                    asked,
                    attention_mask=torch.ones_like(asked),
                    max_new_tokens=options.new_tokens,
                    pad_token_id=EOS,
                    **how,
                ).tolist()
            ended = [row[: row.index(EOS, length) + 1] if EOS in row[length:] else row for row in found]
            file.writelines(json.dumps({"token_ids": row, "prompt_length": length}) + "\n" for row in ended)
            written += sum(len(row) - length for row in ended)
            batches += 1
            print(f"{batches} batches, {written:,} tokens, {end - time.monotonic():.0f} s left", flush=True)


if __name__ == "__main__":
    main()
