"""The prefix index: which full blocks of tokens have their keys and values in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

Parent = int | str
"""What comes before a block: the number of the node before it, or, at the start, the salt."""


class Node(NamedTuple):
    """One indexed block."""

    number: int  # never reused, so that a child cannot find itself under another's content
    block: int


class PrefixIndex:
    """Full blocks by (what came before, their tokens).

    The chain runs through node numbers: a node stands for all tokens from the salt to its block's end.
    The dictionary hashes the key and then compares it, tokens and parent both, so two prefixes whose
    hashes collide are never taken for each other. What a drafter keeps in a block may depend on the
    `num_after` tokens that follow it; those are part of the key then.
    """

    def __init__(self, block_size: int, num_after: int = 0) -> None:
        self.block_size = block_size
        self.num_after = num_after
        self._nodes: dict[object, Node] = {}
        self._keys: dict[int, object] = {}  # by block
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._nodes)

    @staticmethod
    def _key(parent: Parent, tokens: tuple[int, ...]) -> object:
        return parent, tokens

    def match(self, tokens: Sequence[int], salt: str) -> list[Node]:
        """The longest run of full blocks from the start of `tokens` that is indexed."""
        width = self.block_size + self.num_after
        parent: Parent = salt
        nodes: list[Node] = []
        for start in range(0, len(tokens) - width + 1, self.block_size):
            node = self._nodes.get(self._key(parent, tuple(tokens[start : start + width])))
            if node is None:
                break
            nodes.append(node)
            parent = node.number
        return nodes

    def insert(self, parent: Parent, tokens: tuple[int, ...], block: int) -> Node:
        """Index a block by its tokens and the `num_after` behind them.

        Returns its node, which is another block's if these tokens are there already.
        """
        assert len(tokens) == self.block_size + self.num_after, f"a block of {len(tokens)} tokens is not full"
        assert block not in self._keys, f"block {block} is indexed twice"
        key = self._key(parent, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(next(self._numbers), block)
            self._keys[block] = key
        return node

    def remove(self, block: int) -> None:
        """The indexed block is given away. Blocks indexed under it can no longer be found; they age out."""
        del self._nodes[self._keys.pop(block)]

    def clear(self) -> None:
        """Forget everything."""
        self._nodes.clear()
        self._keys.clear()

    def blocks(self) -> set[int]:
        """Every indexed block."""
        return set(self._keys)
