import pytest

from pagedserve_engine.cache.pool import NULL_BLOCK, BlockPool
from pagedserve_engine.errors import ConfigError


def key(text, group=0):
    return group, text.encode()


def cached(pool, *texts):
    """Blocks that hold these contents and that nobody references, oldest first."""
    blocks = pool.allocate(len(texts))
    for block, text in zip(blocks, texts, strict=True):
        pool.register(block, key(text))
    pool.release(blocks)
    return blocks


def test_the_null_block_is_never_handed_out_nor_counted():
    pool = BlockPool(5)
    assert pool.num_total == pool.num_free == 4
    assert NULL_BLOCK not in pool.allocate(4)
    pool.check()


def test_a_pool_without_a_usable_block_is_refused():
    with pytest.raises(ConfigError, match="NUM_BLOCKS is 1"):
        BlockPool(1)


def test_allocation_is_all_or_nothing():
    pool = BlockPool(5)
    pool.allocate(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert len(pool.allocate(2)) == 2
    assert pool.allocate(0) == []
    pool.check()


def test_a_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(5)
    (block,) = pool.allocate(1)
    pool.register(block, key("a"))
    pool.take(block)
    pool.release([block])
    assert pool.num_referenced == 1
    pool.release([block])
    assert (pool.num_referenced, pool.num_cached, pool.num_free) == (0, 1, 4)
    pool.check()


def test_a_cached_block_is_found_and_taken_out_of_the_free_ones():
    pool = BlockPool(5)
    (block,) = cached(pool, "a")
    assert pool.find(key("a")) == block
    assert pool.is_idle(block)
    pool.take(block)
    assert (pool.num_free, pool.num_cached) == (3, 0)
    assert not pool.is_idle(block)
    assert block not in pool.allocate(3)
    pool.check()


def test_equal_hashes_of_two_groups_are_two_contents():
    pool = BlockPool(5)
    first, second = pool.allocate(2)
    pool.register(first, key("a", group=0))
    pool.register(second, key("a", group=1))
    assert (pool.find(key("a", group=0)), pool.find(key("a", group=1))) == (first, second)


def test_blank_blocks_are_reused_before_cached_ones_and_those_oldest_first():
    pool = BlockPool(6)
    a, b = cached(pool, "a", "b")
    blank = pool.allocate(3)
    assert {a, b}.isdisjoint(blank)
    assert pool.allocate(1) == [a]
    assert pool.find(key("a")) is None
    assert pool.find(key("b")) == b
    pool.check()


def test_a_hit_makes_a_block_the_youngest_of_the_cached():
    pool = BlockPool(3)
    a, b = cached(pool, "a", "b")
    pool.take(a)
    pool.release([a])
    assert pool.allocate(2) == [b, a]


def test_a_reused_block_has_no_content_to_find():
    pool = BlockPool(2)
    cached(pool, "a")
    (block,) = pool.allocate(1)
    pool.register(block, key("b"))
    assert (pool.find(key("a")), pool.find(key("b"))) == (None, block)
    pool.check()


def test_the_first_owner_of_a_content_keeps_it():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, key("a"))
    pool.register(second, key("a"))
    pool.register(first, key("a"))
    assert pool.find(key("a")) == first
    pool.release([second])
    assert pool.num_cached == 0
    assert pool.find(key("a")) == first
    pool.check()


def test_a_held_block_can_be_forgotten():
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.register(block, key("a"))
    pool.forget(block)
    pool.forget(block)
    assert pool.find(key("a")) is None
    pool.release([block])
    assert pool.num_cached == 0
    pool.check()


def test_a_cached_block_becomes_blank_when_forgotten():
    pool = BlockPool(4)
    (block,) = cached(pool, "a")
    pool.forget(block)
    assert (pool.num_cached, pool.num_free) == (0, 3)
    pool.check()


@pytest.mark.parametrize(("count", "evicted"), [(None, 3), (2, 2), (9, 3), (0, 0), (-1, 0)])
def test_eviction_forgets_the_oldest_cached_blocks(count, evicted):
    pool = BlockPool(8)
    cached(pool, "a", "b", "c")
    assert pool.evict_cached(count) == evicted
    assert [text for text in "abc" if pool.find(key(text))] == list("abc")[evicted:]
    assert pool.num_free == 7
    pool.check()


def test_releasing_what_nobody_holds_is_a_bug():
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="more often"):
        pool.release([1])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda pool: pool._blank.append(pool._blank[0]), id="a block free twice"),
        pytest.param(lambda pool: pool._blank.pop(), id="a block lost"),
        pytest.param(lambda pool: pool._blank.append(NULL_BLOCK), id="the null block free"),
        pytest.param(lambda pool: pool._key_of.clear(), id="keys without blocks"),
        pytest.param(lambda pool: pool._cached.update({pool._blank.pop(): None}), id="cached without a key"),
    ],
)
def test_check_finds_damage(damage):
    pool = BlockPool(6)
    cached(pool, "a")
    pool.check()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check()
