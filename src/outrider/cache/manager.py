"""Block tables: matched against the prefix index when opened, grown while running, indexed as they fill."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.cache.pool import BlockPool
from outrider.cache.prefix import Parent, PrefixIndex


@dataclass(slots=True, eq=False)
class BlockTable:
    """One running request's blocks, in the order of its positions. Changed by its manager only."""

    blocks: list[int]
    num_cached: int  # leading tokens whose keys and values were there when the table was opened
    num_filed: int  # leading blocks that are in the prefix index, this table's or another's of the same tokens
    parent: Parent  # the index's node for the last of them
    next_file: int  # computed tokens at which the next block can be filed: `commit` has something to do


class CacheManager:
    """Shares one pool of blocks between requests, and full blocks of equal prefixes too.

    Every block of a table is either full and shared by requests with the same tokens up to its end,
    or the table's own. A block enters the prefix index once all its tokens are committed and
    computed, so that nothing ever finds a rejected draft.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, rerun: int = 0) -> None:
        """`rerun`: the last tokens of a prompt, besides the very last, to run whatever the cache holds of them.

        Drafters ask for it: what they keep for a token may depend on the `rerun` tokens after it, so a
        block is found only where those, too, are the same.
        """
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.rerun = rerun
        self.num_queried = 0  # tokens of all tables opened
        self.num_hit = 0  # of those, found in the cache
        self.index = PrefixIndex(block_size, num_after=rerun)
        self.pool = BlockPool(num_blocks, self._evict)
        self._tables: set[BlockTable] = set()

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be given away, those kept only for their prefixes included."""
        return self.pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, from 0 to 1."""
        return 1.0 - self.pool.num_free / self.pool.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def open(self, tokens: Sequence[int], num_tokens: int, *, salt: str = "", reserve: int = 0) -> BlockTable | None:
        """A table with room for `num_tokens` >= len(tokens), its longest cached prefix shared.

        The hit is whole blocks and leaves at least `rerun` + 1 of the tokens to be run. None, and
        nothing has changed, if that would leave fewer than `reserve` blocks free.
        """
        nodes = self.index.match(tokens, salt) if self.enable_prefix_caching else []
        del nodes[max(0, (len(tokens) - 1 - self.rerun) // self.block_size) :]
        shared = [node.block for node in nodes]
        num_new = self.blocks_for(num_tokens) - len(shared)
        num_revived = sum(not self.pool.is_owned(block) for block in shared)
        if num_new + num_revived + reserve > self.pool.num_free:
            return None
        self.pool.share(shared)
        num_cached = len(shared) * self.block_size
        self.num_queried += len(tokens)
        self.num_hit += num_cached
        table = BlockTable(
            blocks=shared + self.pool.take(num_new),
            num_cached=num_cached,
            num_filed=len(shared),
            parent=nodes[-1].number if nodes else salt,
            next_file=num_cached + self.block_size + self.rerun if self.enable_prefix_caching else sys.maxsize,
        )
        self._tables.add(table)
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> tuple[int, ...] | None:
        """Append blocks until the table has room for `num_tokens`; the blocks appended, () if it had.

        None, and nothing has changed, if too few are free.
        """
        num_new = self.blocks_for(num_tokens) - len(table.blocks)
        if num_new <= 0:
            return ()
        if num_new > self.pool.num_free:
            return None
        blocks = self.pool.take(num_new)
        table.blocks += blocks
        return tuple(blocks)

    def commit(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """File the blocks that the first `num_computed` of the request's committed `tokens` have filled.

        To be called when `num_computed` reaches `table.next_file`; earlier calls do nothing.
        """
        assert num_computed <= len(tokens), f"{num_computed} computed of {len(tokens)} tokens: drafts are not committed"
        while table.next_file <= num_computed:
            block = table.blocks[table.num_filed]
            start = table.num_filed * self.block_size
            node = self.index.insert(table.parent, tuple(tokens[start : table.next_file]), block)
            if node.block == block:
                self.pool.keep(block)
            table.parent = node.number
            table.num_filed += 1
            table.next_file += self.block_size

    def forget(self, table: BlockTable) -> None:
        """Take the table's blocks out of the prefix index, those that it shares too: nobody finds them any more."""
        for block in table.blocks:
            if self.pool.forget(block):
                self.index.remove(block)
        table.next_file = sys.maxsize

    def free(self, table: BlockTable) -> None:
        """Give the table's blocks back, the last first: the ends of prefixes are evicted before their starts."""
        self._tables.remove(table)
        self.pool.release(reversed(table.blocks))

    def clear_prefixes(self) -> None:
        """Forget all cached prefixes. No table may be open."""
        assert not self._tables, f"{len(self._tables)} tables are open"
        self.index.clear()
        self.pool.forget_all()

    def check(self) -> None:
        """Raise AssertionError, with what is wrong, unless every block is free, cached or owned as the tables say."""
        owned = Counter(block for table in self._tables for block in table.blocks)
        self.pool.check(dict(owned), self.index.blocks())
        for table in self._tables:
            assert len(set(table.blocks)) == len(table.blocks), f"a table holds a block twice: {table.blocks}"
            for block in table.blocks[table.num_filed :]:
                assert owned[block] == 1, f"block {block} is not full but {owned[block]} tables hold it"

    def _evict(self, block: int) -> None:
        self.index.remove(block)
