"""Logits processors: what a request asks of the distribution of the target, one file each."""
