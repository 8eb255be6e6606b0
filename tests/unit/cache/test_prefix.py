import pytest

from outrider.cache.prefix import PrefixIndex


class Colliding(int):
    """A token whose hash is every other's: all blocks of one parent fall together."""

    def __hash__(self) -> int:
        return 0


def blocks(index: PrefixIndex, tokens: object, salt: str = "") -> list[int]:
    return [node.block for node in index.match(tokens, salt)]  # type: ignore[arg-type]


def fill(index: PrefixIndex, tokens: tuple[int, ...], first_block: int, salt: str = "") -> None:
    parent: int | str = salt
    width = index.block_size + index.num_after
    starts = range(0, len(tokens) - width + 1, index.block_size)
    for block, start in enumerate(starts, first_block):
        parent = index.insert(parent, tokens[start : start + width], block).number


def test_matches_the_longest_run_of_full_blocks() -> None:
    index = PrefixIndex(2)
    fill(index, (1, 2, 3, 4, 5, 6), first_block=10)
    assert blocks(index, [1, 2, 3, 4, 5, 6, 7]) == [10, 11, 12]
    assert blocks(index, [1, 2, 3, 4, 5]) == [10, 11]
    assert blocks(index, [1, 2, 9, 4, 5, 6]) == [10]
    assert blocks(index, [1]) == blocks(index, [2, 1]) == []


def test_equal_tokens_after_different_ones_are_different() -> None:
    index = PrefixIndex(2)
    fill(index, (1, 2, 7, 7), first_block=0)
    fill(index, (3, 4, 7, 7), first_block=2)
    assert blocks(index, [1, 2, 7, 7]) == [0, 1]
    assert blocks(index, [3, 4, 7, 7]) == [2, 3]
    assert blocks(index, [7, 7]) == []


def test_salts_keep_apart() -> None:
    index = PrefixIndex(2)
    fill(index, (1, 2), first_block=0, salt="tenant")
    assert blocks(index, [1, 2]) == []
    assert blocks(index, [1, 2], salt="tenant") == [0]


def test_the_same_tokens_twice_keep_the_first_block() -> None:
    index = PrefixIndex(2)
    first = index.insert("", (1, 2), 0)
    assert index.insert("", (1, 2), 1) == first
    assert index.blocks() == {0} and len(index) == 1


def test_colliding_hashes_are_told_apart() -> None:
    index = PrefixIndex(2)
    one, two, three, four = map(Colliding, (1, 2, 3, 4))
    assert hash((one, two)) == hash((three, four))
    fill(index, (one, two, three, four), first_block=0)
    fill(index, (three, four, one, two), first_block=2)
    assert blocks(index, [one, two, one, two]) == [0]
    assert blocks(index, [three, four, one, two]) == [2, 3]
    assert blocks(index, [two, one]) == []


def test_the_tokens_after_a_block_are_part_of_it_when_a_drafter_needs_them() -> None:
    index = PrefixIndex(2, num_after=1)
    fill(index, (1, 2, 3, 4, 5), first_block=0)
    fill(index, (1, 2, 9), first_block=2)
    assert blocks(index, [1, 2, 3, 4, 5]) == [0, 1]
    assert blocks(index, [1, 2, 3, 4]) == [0]
    assert blocks(index, [1, 2, 3, 4, 6]) == [0]
    assert blocks(index, [1, 2, 9, 4, 5]) == [2]
    assert blocks(index, [1, 2]) == []


def test_a_removed_block_hides_those_behind_it_for_good() -> None:
    index = PrefixIndex(1)
    fill(index, (1, 2), first_block=0)
    index.remove(0)
    assert blocks(index, [1, 2]) == []
    index.insert("", (1,), 5)
    assert blocks(index, [1, 2]) == [5], "a child found itself under another node of the same tokens"
    index.remove(1)
    assert index.blocks() == {5}


def test_misuse_is_an_error() -> None:
    index = PrefixIndex(2)
    with pytest.raises(AssertionError, match="not full"):
        index.insert("", (1,), 0)
    index.insert("", (1, 2), 0)
    with pytest.raises(AssertionError, match="indexed twice"):
        index.insert("", (1, 3), 0)


def test_clear() -> None:
    index = PrefixIndex(1)
    fill(index, (1, 2), first_block=0)
    index.clear()
    assert len(index) == 0 and blocks(index, [1]) == [] and index.blocks() == set()
