"""Arguments for the ops between logits and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from outrider.tensors import Purpose

Example = Mapping[str, Any]


def divide_logits(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for rows, size in ((1, 5), (33, 70), (7, 4999)):
        yield {
            "logits": (torch.randn((rows, size), generator=generator) * 9).to(device),
            "temperature": torch.tensor([0.0, 0.7, 1.0, 2.5]).to(device),
            "slot": (torch.arange(1, rows + 1) % 4).to(device),
        }


def min_tokens_mask(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for rows, size, width in ((1, 5, 1), (33, 70, 3), (7, 1031, 9)):
        slots = 4
        banned = torch.randint(-1, size + 5, (slots, width), generator=generator)
        yield {
            "logits": torch.randn((rows, size), generator=generator).to(device),
            "slot": torch.randint(0, slots, (rows,), generator=generator).to(device),
            "position": torch.randint(0, 10, (rows,), generator=generator).to(device),
            "min_length": torch.randint(0, 10, (slots,), generator=generator).int().to(device),
            "banned": banned.to(device),
        }


def noise_bits(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for rows, num_indices in ((1, 1), (3, 257), (7, 33)):
        seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator, dtype=torch.int64)
        position = torch.randint(0, 2**20, (rows,), generator=generator)
        yield {
            "seed": seed.to(device),
            "position": position.to(device),
            "purpose": rows,
            "num_indices": num_indices,
        }


def gumbel_argmax(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    slots = 4
    temperature = torch.arange(slots).float() % 3
    seed = torch.randint(-(2**62), 2**62, (slots,), generator=generator)
    for rows, size, scale in (
        (1, 1, 1.0),
        (3, 7, 1.0),
        (5, 1031, 0.0),
        (7, 6144, 3.0),
        (2, 4999, 12.0),
        (33, 2050, 1.0),
        (1, 151_936, 2.0),
    ):
        logits = torch.randn((rows, size), generator=generator) * scale
        if size > 100:
            logits[0, ::3] = -torch.inf
        if rows > 4:
            logits[1] = logits[1].round()  # ties
            logits[2] = -torch.inf
            logits[3] = -torch.inf
            logits[3, size - 1] = -900.0
            logits[4, 5::7] = torch.inf
        if rows > 6:
            logits[5, size - 2] = torch.nan
            logits[6, 1] = -torch.tensor(torch.nan)
            logits[0, size // 2] = torch.finfo(torch.float32).max
        slot = (torch.arange(rows) + 1) % slots  # a row alone is drawn with noise
        example = {
            "logits": logits.to(device),
            "temperature": temperature.to(device),
            "seed": seed.to(device),
            "position": torch.randint(0, 4096, (rows,), generator=generator).to(device),
            "purpose": int(Purpose.TARGET),
            "slot": slot.to(device),
        }
        own = {"temperature": temperature[slot].to(device), "seed": seed[slot].to(device), "slot": None}
        ids = torch.randperm(3 * size, generator=generator)[:size].sort().values.to(device)
        yield example
        yield {**example, **own, "ids": ids}
        if size in (7, 6144):
            yield {**example, "temperature": None, "ids": ids}
            yield {**example, "temperature": None}


def truncate(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    asked = {
        "top_k": torch.tensor([0, 1, 40, 0, 0, 5, 20, 5, 9999], dtype=torch.int32, device=device),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.5, 0.95, 0.01, 0.999], device=device),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.01, 0.0, 0.5], device=device),
    }
    for size, scale in ((1, 1.0), (7, 1.0), (1031, 3.0), (6144, 0.5)):
        logits = torch.randn((9, size), generator=generator) * scale
        logits[5] = logits[5].round()  # ties
        logits[6, 1::2] = -torch.inf
        yield {"logits": logits.to(device), **asked}
    for slot, size in (([3], 700), ([6], 151_936), ([7, 0, 3, 8, 1, 2, 4, 6, 5, 7, 3], 70)):
        logits = torch.randn((len(slot), size), generator=generator) * 2
        if len(slot) > 1:
            logits[2, 1:] = -torch.inf
            logits[7:9] = 0.0
        yield {
            "logits": logits.to(device),
            **asked,
            "temperature": torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 1.0, 0.6, 0.0, 1.0], device=device),
            "slot": torch.tensor(slot, device=device),
        }
