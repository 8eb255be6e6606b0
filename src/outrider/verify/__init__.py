"""Verification and logits processors. `base` is the contract."""
