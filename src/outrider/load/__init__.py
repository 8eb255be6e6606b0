"""Reading checkpoints: configs, weights, tokenizers, and what their files say."""
