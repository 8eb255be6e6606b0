import pytest

from outrider.cache.pool import BlockPool


def make(num_blocks: int = 4) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, evicted.append), evicted


def test_takes_and_gives_back() -> None:
    pool, evicted = make()
    blocks = pool.take(3)
    assert len(set(blocks)) == 3 and pool.num_free == 1
    assert all(pool.is_owned(block) for block in blocks)
    pool.release(blocks)
    assert pool.num_free == 4 and pool.num_cached == 0 and not evicted
    pool.check({}, set())


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool, _ = make()
    blocks = pool.take(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.is_owned(blocks[0]) and pool.num_free == 3
    pool.check({blocks[0]: 1}, set())
    pool.release(blocks)
    assert pool.num_free == 4


def test_empty_blocks_go_before_cached_ones_and_those_in_order_of_release() -> None:
    pool, evicted = make()
    first, second, third = pool.take(3)
    for block in (first, second):
        pool.keep(block)
    pool.release([second, first, third])
    assert (pool.num_free, pool.num_cached) == (4, 2)
    pool.check({}, {first, second})
    taken = pool.take(2)
    assert third in taken and not evicted
    assert pool.take(2) == [second, first] == evicted
    assert pool.num_cached == 0


def test_a_cached_block_is_revived_by_sharing_it() -> None:
    pool, evicted = make(2)
    first, second = pool.take(2)
    pool.keep(first)
    pool.keep(second)
    pool.release([first, second])
    pool.share([first])
    assert pool.num_free == 1
    assert pool.take(1) == [second] == evicted


def test_forget_all_empties_cached_blocks() -> None:
    pool, evicted = make()
    blocks = pool.take(2)
    pool.keep(blocks[0])
    pool.release(blocks)
    pool.forget_all()
    pool.check({}, set())
    assert len(pool.take(4)) == 4 and not evicted


def test_misuse_is_an_error() -> None:
    pool, _ = make()
    with pytest.raises(AssertionError, match="5 blocks asked, 4 free"):
        pool.take(5)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="nobody owns"):
        pool.keep(blocks[0])


def test_check_names_what_is_wrong() -> None:
    pool, _ = make()
    blocks = pool.take(2)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check({blocks[0]: 1}, set())
    with pytest.raises(AssertionError, match="record only"):
        pool.check(dict.fromkeys(blocks, 1), {blocks[0]})
    pool._empty.append(pool._empty[0])
    with pytest.raises(AssertionError, match="twice"):
        pool.check(dict.fromkeys(blocks, 1), set())
    pool._empty[1:] = []
    with pytest.raises(AssertionError, match="not the 4 of the pool"):
        pool.check(dict.fromkeys(blocks, 1), set())
