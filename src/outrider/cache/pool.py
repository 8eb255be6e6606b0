"""The pool of cache blocks: who holds how many references, and which block goes next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Block ids 0 to num_blocks - 1, each in exactly one of three states.

    Owned: at least one table refers to it. Cached: nobody does, but its content is in the prefix
    index and may be shared again. Empty: nobody does, and its content means nothing. Empty and
    cached blocks are free; empty ones are taken first, then the cached one released longest ago.
    """

    def __init__(self, num_blocks: int, evict: Callable[[int], None]) -> None:
        """`evict(block)` is called when a cached block is about to be given away."""
        self.num_blocks = num_blocks
        self._evict = evict
        self._references = [0] * num_blocks
        self._kept = [False] * num_blocks  # content is in the prefix index
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give: empty and cached."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content may still be shared."""
        return len(self._cached)

    def is_owned(self, block: int) -> bool:
        """Whether any table refers to the block."""
        return self._references[block] > 0

    def take(self, count: int) -> list[int]:
        """Give away `count` <= num_free blocks, one reference each, evicting cached ones if it must."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._kept[block] = False
                self._evict(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks, which are owned or cached."""
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each. Blocks released first are evicted first."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is released more often than it was taken"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._kept[block]:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def keep(self, block: int) -> None:
        """The owned block's content is now in the prefix index: cache it when it is released."""
        assert self._references[block] > 0, f"block {block} is kept but nobody owns it"
        self._kept[block] = True

    def forget(self, block: int) -> bool:
        """The owned block is to be empty when it is released; False if it was to be so already."""
        was_kept, self._kept[block] = self._kept[block], False
        return was_kept

    def forget_all(self) -> None:
        """The prefix index was emptied: cached blocks become empty ones."""
        self._kept = [False] * self.num_blocks
        self._empty.extend(self._cached)
        self._cached.clear()

    def check(self, owned: dict[int, int], kept: set[int]) -> None:
        """Raise AssertionError unless free + cached + owned = all, given every reference and every indexed block."""
        references = {block: count for block, count in enumerate(self._references) if count}
        assert references == owned, f"reference counts {references} but tables hold {owned}"
        marked = {block for block, is_kept in enumerate(self._kept) if is_kept}
        assert marked == kept, f"blocks {sorted(marked ^ kept)} are in the pool's or the index's record only"
        empty, cached = set(self._empty), set(self._cached)
        assert len(empty) == len(self._empty), f"a block is twice in the empty list: {self._empty}"
        assert cached <= kept and not empty & kept, f"cached {cached} and empty {empty} against indexed {kept}"
        states = [*self._empty, *self._cached, *references]
        assert sorted(states) == list(range(self.num_blocks)), (
            f"{len(empty)} empty + {len(cached)} cached + {len(references)} owned blocks are not "
            f"the {self.num_blocks} of the pool, each once"
        )
