"""Trains the byte-level BPE tokenizer and saves it in the form that `transformers.AutoTokenizer` loads.

python tokenizer.py --work DIR --out DIR      reads train.jsonl and chat.jsonl, checks validation.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 6144
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", *(f"<|reserved_{i}|>" for i in range(4))]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train(texts: list[str]) -> Tokenizer:
    """Trains the tokenizer; the special tokens have the ids 0 to 7."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the vocabulary has {tokenizer.get_vocab_size()} entries, not {VOCABULARY}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "mask_token": SPECIAL[3]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": [SPECIAL[1], SPECIAL[2]],
        "chat_template": CHAT_TEMPLATE,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def check(folder: Path, texts: list[str]) -> float:
    """Checks that `transformers` loads the tokenizer and that texts survive a round trip; returns bytes per token."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = count = 0
    for text in texts:
        ids = loaded(text)["input_ids"]
        if ids != plain.encode(text).ids or loaded.decode(ids) != text:
            raise ValueError(f"the round trip changed {text[:200]!r}")
        size, count = size + len(text.encode()), count + len(ids)
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    if chat != "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n":
        raise ValueError(f"the chat template rendered {chat!r}")
    return size / count


def read_texts(path: Path) -> list[str]:
    """The text of every document of a JSONL file."""
    with open(path) as file:
        return [json.loads(line)["text"] for line in file]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bundle"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/bundle/tokenizer"))
    parser.add_argument("--megabytes", type=float, default=80, help="size of the sample to train on")
    options = parser.parse_args()
    texts = read_texts(options.work / "train.jsonl") + read_texts(options.work / "chat.jsonl")
    share = options.megabytes * 1e6 / sum(map(len, texts))
    random.Random(0).shuffle(texts)
    save(train(texts[: int(share * len(texts))]), options.out)
    hard = ["  a\t\tb \n\n\n   \r\n c", "naïve café ✓ 日本 🙂", "x = 'don''t' # \u00a0", "\n", "    ", "a  .  b , c !"]
    figure = check(options.out, read_texts(options.work / "validation.jsonl") + hard)
    print(f"{figure:.3f} bytes per token on the validation files")


if __name__ == "__main__":
    main()
