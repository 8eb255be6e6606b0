"""Writes a tiny Qwen3 checkpoint with transformers, and gets the same greedy tokens from both."""

import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from outrider import LLM, SamplingParams

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
reference = Qwen3ForCausalLM(config).float().eval()
prompt = list(range(1, 40))

with tempfile.TemporaryDirectory() as directory:
    reference.save_pretrained(directory)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=-1)
    sampling = SamplingParams(temperature=0.0, max_tokens=64, detokenize=False)
    for drafting in (None, {"method": "ngram", "num_speculative_tokens": 4}):
        with LLM(directory, speculative_config=drafting) as llm:
            got = llm.generate(prompt, sampling)[0]
        same = got.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
        print(f"drafting {drafting}: same 64 greedy tokens as transformers: {same}")
        assert same
