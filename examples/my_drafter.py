"""A drafter of one's own in plain Python: guesses that whatever followed the last token will follow it again.

PYTHONPATH=examples outrider generate --prompt "def main():" --draft my_drafter:LastTime --compare
"""

from collections.abc import Sequence

from outrider import HostDrafter


class LastTime(HostDrafter):
    """Copies what came after the previous occurrence of the last token."""

    name = "last_time"

    def guess(self, slot: int, tokens: list[int]) -> Sequence[int]:
        for place in range(len(tokens) - 2, -1, -1):
            if tokens[place] == tokens[-1]:
                return tokens[place + 1 : place + 1 + self.num_drafts]
        return []
