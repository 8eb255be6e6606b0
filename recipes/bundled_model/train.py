r"""Trains the bundled model for a fixed time and exports it.

    python train.py --data .bundle --out DIR --minutes 16
    python train.py --data .bundle --out DIR --minutes 0.5 --device cpu --no-compile \
        --tokens-per-step 1024 --eval-tokens 4100

DIR receives log.jsonl, metrics.json, samples.txt and checkpoint/ (rewritten every two minutes).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export import END_OF_TURN, EOS, check_checkpoint, write_checkpoint
from model import Config, Loss, Model
from optimizer import Muon
from torch import Tensor
from torch.nn import functional

PROMPTS = Path(__file__).parents[2] / "src" / "outrider" / "bundled" / "prompts"
SHORT, LONG = 1024, 2048
LONG_FROM = 0.8
DECAY_FROM = 0.4
WARM_UP_STEPS = 150
CHAT_REPEATS_LATE = 2


def load_tokens(folder: Path, split: str) -> np.ndarray:
    """Decompresses and joins the blocks of one split."""
    blocks = sorted(folder.glob(f"{split}.*.xz"))
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda path: np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint16), blocks)
    return np.concatenate(list(parts)).astype(np.int16)


def split_documents(tokens: np.ndarray) -> list[np.ndarray]:
    """Views of the documents, each with its closing separator."""
    ends = np.flatnonzero(tokens == EOS) + 1
    return np.split(tokens, ends[:-1])


class Batches:
    """An endless stream of (rows, length + 1) windows over the documents, reshuffled and repacked every epoch."""

    def __init__(self, documents: list[np.ndarray], device: torch.device, seed: int) -> None:
        self.documents, self.device = documents, device
        self.random = np.random.default_rng(seed)
        self.pool = ThreadPoolExecutor(1)
        self.coming: Future[Tensor] = self.pool.submit(self.pack)
        self.current = torch.empty(0, dtype=torch.int16, device=device)
        self.position = 0
        self.epochs = 0

    def pack(self) -> Tensor:
        """All documents in a new random order, as one row of tokens on the device."""
        order = self.random.permutation(len(self.documents))
        return torch.from_numpy(np.concatenate([self.documents[index] for index in order])).to(self.device)

    def next(self, rows: int, length: int) -> Tensor:
        """The next windows; a window's last token is the next window's first."""
        size = rows * length
        if self.position + size >= len(self.current):
            self.current, self.position = self.coming.result(), 0
            self.coming = self.pool.submit(self.pack)
            self.epochs += 1
        piece = self.current[self.position : self.position + size + 1].long()
        self.position += size
        return piece.unfold(0, length + 1, length)


@torch.no_grad()
def evaluate(model: Model, tokens: np.ndarray, density: float, length: int, device: torch.device) -> dict[str, float]:
    """Per-token loss, perplexity and bits per byte over `tokens`, of which one byte of text takes `density`."""
    count = (len(tokens) - 1) // length
    windows = torch.from_numpy(tokens[: count * length + 1]).to(device).long().unfold(0, length + 1, length)
    total = 0.0
    for rows in windows.split(max(1, 32768 // length)):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(rows[:, :-1])
        total += functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum").item()
    loss = total / (count * length)
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) * density}


class Trainer:
    """Model, optimisers and the learning-rate schedule."""

    def __init__(self, options: argparse.Namespace, compiled: bool) -> None:
        self.options = options
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.model = Model(Config()).to(self.device)
        self.loss = Loss(self.model, compiled)
        self.reset()

    def reset(self) -> None:
        """Returns to the initial weights, with new optimisers."""
        torch.manual_seed(self.options.seed)
        initial = Model(Config()).state_dict()
        self.model.load_state_dict(initial)
        layers = [p for p in self.model.model.layers.parameters() if p.dim() == 2]
        chosen = {id(parameter) for parameter in layers}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = Muon(layers, lr=self.options.muon_lr)
        cuda = self.device.type == "cuda"
        self.adam = torch.optim.AdamW(others, lr=self.options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)

    def step(self, window: Tensor, scale: float) -> Tensor:
        """One optimiser step on a batch, accumulated over its parts; returns the mean loss, still on the device."""
        total = torch.zeros((), device=self.device)
        parts = window.chunk(self.options.accumulate)
        for part in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.loss(part) / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(scale)
        for group in self.adam.param_groups:
            group["lr"] = self.options.adam_lr * scale
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        return total


def schedule(step: int, progress: float) -> float:
    """Linear warm-up over steps, then constant, then linear decay to zero at the end of the time budget."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.0, 1 - progress) / (1 - DECAY_FROM))


def self_check(trainer: Trainer, batches: Batches, data: Path, out: Path) -> None:
    """Runs a few steps at both lengths, checks that the loss falls and that the export loads in transformers."""
    size = trainer.options.tokens_per_step
    losses: list[float] = []
    for length in (SHORT, LONG):
        began = time.perf_counter()
        losses += [trainer.step(batches.next(max(1, size // length), length), 0.3).item() for _ in range(4)]
        seconds = time.perf_counter() - began
        print(f"self-check: length {length}, compile and 4 steps {seconds:.1f} s", flush=True)
        began = time.perf_counter()
        losses += [trainer.step(batches.next(max(1, size // length), length), 0.3).item() for _ in range(6)]
        rate = 6 * max(1, size // length) * length / (time.perf_counter() - began)
        print(f"self-check: length {length}, {rate:,.0f} tokens/s, loss {losses[-1]:.3f}", flush=True)
    print(f"self-check: losses {[round(loss, 3) for loss in losses]}", flush=True)
    if not losses[-1] < losses[0]:
        raise RuntimeError("self-check: the loss does not fall")
    if trainer.device.type == "cuda":
        print(f"self-check: peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    write_checkpoint(trainer.model, data / "tokenizer", out / "self_check")
    print(f"self-check: passed, logits within {check_checkpoint(out / 'self_check'):.1e} of transformers", flush=True)
    (out / "self_check.ok").touch()


def write_samples(folder: Path, out: Path, device: torch.device) -> None:
    """Writes completions of held-out prompts and two chat edits, generated by transformers from the checkpoint."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        json.loads(line)["prompt"] for line in (PROMPTS / "heldout_prompts.jsonl").read_text().splitlines()[::20]
    ]
    edits = [json.loads(line)["prompt"] for line in (PROMPTS / "edit_prompts.jsonl").read_text().splitlines()[:2]]
    request = "Write a function `is_even` that returns True if a number is even."
    chat = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
    chosen = [*prompts[:12], *edits, chat]
    batch = tokenizer(chosen, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    answers: dict[str, list[str]] = {}
    for name, extra in (("greedy", {"do_sample": False}), ("0.8", {"do_sample": True, "temperature": 0.8})):
        stop = [EOS, END_OF_TURN]
        with torch.no_grad():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=256, eos_token_id=stop, **extra)
        rows = output[:, ids.shape[1] :]
        answers[name] = [tokenizer.decode(row).replace("<|endoftext|>", "") for row in rows]
    parts = []
    for prompt, greedy, warm in zip(chosen, answers["greedy"], answers["0.8"], strict=True):
        parts.append(f"######## prompt\n{prompt}\n######## greedy\n{greedy}\n\n######## temperature 0.8\n{warm}\n\n")
    out.write_text("".join(parts))


def train(options: argparse.Namespace) -> None:
    """Loads the data, checks itself, trains for the time budget, and writes the results."""
    began = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device(options.device)
    meta: dict[str, dict[str, int]] = json.loads((options.data / "meta.json").read_text())
    density = {name: figures["tokens"] / figures["bytes"] for name, figures in meta.items()}
    splits = {name: load_tokens(options.data, name) for name in ("train", "chat", "validation", "heldout")}
    for name in ("validation", "heldout"):
        splits[name] = splits[name][: options.eval_tokens]
    plain, chat = split_documents(splits["train"]), split_documents(splits["chat"])
    print(f"{len(plain)} + {len(chat)} documents loaded in {time.perf_counter() - began:.1f} s", flush=True)
    trainer = Trainer(options, compiled=options.compile)
    batches = Batches(plain + chat, device, options.seed)
    late: Batches | None = None
    self_check(trainer, batches, options.data, out)
    trainer.reset()

    log = open(out / "log.jsonl", "w", buffering=1)  # noqa: SIM115
    start = last = last_export = last_eval = time.perf_counter()
    budget = options.minutes * 60
    step = tokens = last_tokens = 0
    running: list[Tensor] = []
    while (progress := (time.perf_counter() - start) / budget) < 1:
        length = LONG if progress >= LONG_FROM else SHORT
        if length == LONG and late is None:
            late = Batches(plain + chat * CHAT_REPEATS_LATE, device, options.seed + 1)
        rows = max(1, options.tokens_per_step // length)
        scale = schedule(step, progress)
        running.append(trainer.step((late or batches).next(rows, length), scale))
        step, tokens = step + 1, tokens + rows * length
        if step % options.log_every:
            continue
        loss = torch.stack(running).mean().item()
        running.clear()
        now = time.perf_counter()
        record: dict[str, Any] = {"step": step, "tokens": tokens, "seconds": round(now - start, 2), "loss": loss}
        record |= {"lr": scale * options.muon_lr, "tokens_per_second": round((tokens - last_tokens) / (now - last))}
        last, last_tokens = now, tokens
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {step}; the last checkpoint is kept")
        if now - last_eval > options.eval_seconds:
            last_eval = now
            result = evaluate(trainer.model, splits["validation"], density["validation"], length, device)
            record["validation_loss"] = result["loss"]
        if now - last_export > 120:
            last_export = now
            write_checkpoint(trainer.model, options.data / "tokenizer", out / "checkpoint")
        log.write(json.dumps(record) + "\n")
        if step % (10 * options.log_every) == 0 or "validation_loss" in record:
            print(json.dumps(record), flush=True)
    seconds = time.perf_counter() - start
    write_checkpoint(trainer.model, options.data / "tokenizer", out / "checkpoint")
    metrics: dict[str, Any] = {"steps": step, "tokens": tokens, "seconds": seconds}
    metrics["tokens_per_second"] = tokens / seconds
    metrics |= {"epochs": tokens / (len(splits["train"]) + len(splits["chat"])), "corpus": meta}
    metrics |= {"parameters": sum(p.numel() for p in trainer.model.parameters()), "torch": torch.__version__}
    metrics["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    metrics["options"] = {name: str(value) for name, value in vars(options).items()}
    for split in ("validation", "heldout"):
        for length in (SHORT, LONG):
            result = evaluate(trainer.model, splits[split], density[split], length, device)
            metrics[f"{split}_{length}"] = result
    metrics["largest_logit_difference_to_transformers"] = check_checkpoint(out / "checkpoint")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2), flush=True)
    write_samples(out / "checkpoint", out / "samples.txt", device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".bundle"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=16, help="training time, without loading and compilation")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a step's batch is run in")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-seconds", type=float, default=60)
    parser.add_argument("--eval-tokens", type=int, default=10**9, help="at most so many tokens of each split")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
