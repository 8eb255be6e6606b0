import pytest

from outrider.cache.manager import BlockTable, CacheManager


def opened(manager: CacheManager, tokens: list[int], room: int | None = None, salt: str = "") -> BlockTable:
    table = manager.open(tokens, room or len(tokens), salt=salt)
    assert table is not None
    manager.check()
    return table


def ran(manager: CacheManager, tokens: list[int], salt: str = "") -> list[int]:
    """A request that has come and gone, all its tokens computed. The blocks it had."""
    table = opened(manager, tokens, salt=salt)
    manager.commit(table, tokens, len(tokens))
    manager.free(table)
    manager.check()
    return table.blocks


def test_blocks_for() -> None:
    manager = CacheManager(4, 16)
    assert [manager.blocks_for(count) for count in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_open_grow_free() -> None:
    manager = CacheManager(4, 2)
    table = opened(manager, [1, 2, 3])
    assert (len(table.blocks), table.num_cached, manager.num_free, manager.usage) == (2, 0, 2, 0.5)
    assert manager.grow(table, 4) == ()
    grown = manager.grow(table, 5)
    assert grown is not None and len(grown) == 1 and table.blocks[-1:] == list(grown)
    assert manager.grow(table, 9) is None and len(table.blocks) == 3
    manager.check()
    manager.free(table)
    manager.check()
    assert manager.num_free == 4 and manager.usage == 0.0


def test_full_computed_blocks_are_shared() -> None:
    manager = CacheManager(8, 2)
    blocks = ran(manager, [1, 2, 3, 4, 5])
    table = opened(manager, [1, 2, 3, 4, 6, 7])
    assert table.num_cached == 4 and table.blocks[:2] == blocks[:2]
    again = opened(manager, [1, 2, 3, 4, 5, 6])
    assert again.blocks[:2] == blocks[:2] and not set(again.blocks[2:]) & set(table.blocks)
    assert (manager.num_queried, manager.num_hit) == (17, 8)


def test_the_last_token_is_always_left_to_run() -> None:
    manager = CacheManager(8, 2)
    ran(manager, [1, 2, 3, 4])
    assert opened(manager, [1, 2, 3, 4]).num_cached == 2
    assert opened(manager, [1, 2, 3, 4, 5]).num_cached == 4


@pytest.mark.parametrize("num_tokens, num_cached", [(4, 2), (5, 2), (6, 4), (7, 4), (8, 6)])
def test_rerun_leaves_more_to_run(num_tokens: int, num_cached: int) -> None:
    manager = CacheManager(16, 2, rerun=1)
    ran(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert opened(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9][:num_tokens]).num_cached == num_cached


def test_rerun_finds_a_block_only_before_the_same_tokens() -> None:
    manager = CacheManager(16, 2, rerun=1)
    ran(manager, [1, 2, 3, 4, 5])
    assert opened(manager, [1, 2, 3, 4, 9, 9, 9]).num_cached == 2
    assert opened(manager, [1, 2, 3, 4, 5, 9, 9]).num_cached == 4


def test_only_computed_blocks_are_filed() -> None:
    manager = CacheManager(8, 2)
    table = opened(manager, [1, 2, 3, 4, 5])
    assert table.next_file == 2
    manager.commit(table, [1, 2, 3, 4, 5], 1)
    assert opened(manager, [1, 2, 3, 4, 5]).num_cached == 0
    manager.commit(table, [1, 2, 3, 4, 5], 3)
    assert opened(manager, [1, 2, 3, 4, 5]).num_cached == 2 and table.next_file == 4
    with pytest.raises(AssertionError, match="drafts are not committed"):
        manager.commit(table, [1, 2, 3, 4, 5], 6)


def test_two_who_compute_the_same_keep_one_copy() -> None:
    manager = CacheManager(8, 2)
    tokens = [1, 2, 3, 4]
    first, second = opened(manager, tokens), opened(manager, tokens)
    for table in (first, second):
        manager.commit(table, tokens, 4)
    manager.check()
    manager.free(first)
    manager.free(second)
    manager.check()
    assert manager.pool.num_cached == 2


def test_ends_of_prefixes_are_evicted_first() -> None:
    manager = CacheManager(4, 2)
    ran(manager, [1, 2, 3, 4, 5, 6])
    opened(manager, [7, 8, 9])  # the empty block, and the end of the prefix
    assert opened(manager, [1, 2, 3, 4, 5], room=4).num_cached == 4


def test_open_counts_the_cached_blocks_it_revives() -> None:
    manager = CacheManager(4, 2)
    ran(manager, [1, 2, 3, 4])
    opened(manager, [9, 9])
    assert manager.num_free == 3
    assert manager.open([1, 2, 3, 4, 5], 9) is None
    assert manager.open([1, 2, 3, 4, 5], 5, reserve=1) is None
    manager.check()
    assert manager.num_free == 3 and manager.num_hit == 0
    assert opened(manager, [1, 2, 3, 4, 5]).num_cached == 4 and manager.num_free == 0


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = CacheManager(4, 2, enable_prefix_caching=False)
    ran(manager, [1, 2, 3, 4])
    assert opened(manager, [1, 2, 3, 4]).num_cached == 0
    assert manager.pool.num_cached == 0


def test_salts_keep_apart() -> None:
    manager = CacheManager(8, 2)
    ran(manager, [1, 2, 3], salt="one")
    assert opened(manager, [1, 2, 3], salt="two").num_cached == 0
    assert opened(manager, [1, 2, 3], salt="one").num_cached == 2


def test_clear_prefixes() -> None:
    manager = CacheManager(8, 2)
    ran(manager, [1, 2, 3])
    manager.clear_prefixes()
    manager.check()
    table = opened(manager, [1, 2, 3])
    assert table.num_cached == 0
    with pytest.raises(AssertionError, match="1 tables are open"):
        manager.clear_prefixes()


def test_check_finds_a_block_that_is_shared_but_not_full() -> None:
    manager = CacheManager(8, 2)
    table, other = opened(manager, [1]), opened(manager, [2])
    manager.pool.share(table.blocks)
    other.blocks += table.blocks
    with pytest.raises(AssertionError, match="not full but 2 tables"):
        manager.check()
