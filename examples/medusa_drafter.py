"""Medusa as one file: block i gives the token i + 2 places after the last hidden state (arXiv 2401.10774).

A directory with `blocks` [K, H, H] in its model.safetensors is the option "model"; lm_head is the target's own:
PYTHONPATH=examples outrider generate --prompt "def main():" --speculative-config \
    '{"method": "medusa_drafter:Medusa", "model": "DIRECTORY"}'
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch.nn.functional import silu

from outrider.drafting import Draft, DraftContext, Drafter, DraftOptions, Footprint, option


@dataclass(frozen=True, slots=True)
class MedusaOptions(DraftOptions):
    model: str = option("", "directory of model.safetensors")


class Medusa(Drafter):
    """K residual blocks, each on the target's last hidden state: all drafts at once, and no cache."""

    name, needs, Options = "medusa", frozenset(), MedusaOptions

    @classmethod
    def footprint(cls, options, target):
        return Footprint(weights=options.num_speculative_tokens * target.hidden_size**2 * target.dtype.itemsize)

    def prepare(self, target, caches, dummy_seed, progress):
        blocks = load_file(Path(self.options.model) / "model.safetensors")["blocks"]
        self.head, self.blocks = target.head, blocks[: self.num_drafts].to(self.target.device, self.target.dtype)

    def propose(self, context: DraftContext) -> Draft:
        batch = context.batch
        last = (batch.rows.query_start[:-1] + context.committed - 1).clamp(min=0)  # [B], the last accepted token
        hidden = context.target.hidden[last]  # [B, H]
        hidden = hidden[:, None] + silu(hidden @ self.blocks.to(hidden.dtype)).transpose(0, 1)  # [B, K, H]
        tokens = self.head(hidden.flatten(0, 1)).argmax(-1).view(-1, self.num_drafts)
        samples = batch.logits_start[1:] > batch.logits_start[:-1]  # [B], false inside a prompt
        return Draft(tokens, samples.int() * self.num_drafts, None)
