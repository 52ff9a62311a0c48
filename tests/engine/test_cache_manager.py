import numpy as np
import pytest

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager

FULL = ("full",)
MIXED = ("sliding", "full", "sliding")


def manager(layer_types=FULL, *, window=6, block_size=4, num_blocks=40, max_num_seqs=4, **settings):
    layout = CacheLayout.build(
        layer_types, window=window, num_kv_heads=1, head_dim=2, block_size=block_size, dtype_bytes=4
    )
    return CacheManager(layout, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=64, **settings)


def hashed(cache, tokens, salt=b""):
    hashes = []
    cache.hash_blocks(tokens, hashes, salt)
    return hashes


def run(cache, slot, tokens, *, salt=b"", cached=0):
    """Admit a sequence and compute all of it in one step."""
    hashes = hashed(cache, tokens, salt)
    cache.admit(slot, hashes, cached)
    assert cache.grow(slot, len(tokens))
    cache.seal(slot, hashes, cached // 4, len(tokens) // 4)
    return hashes


def test_hashes_are_chained_over_full_blocks():
    cache = manager()
    tokens = list(range(11))
    hashes = hashed(cache, tokens)
    assert len(hashes) == 2
    assert all(len(one) == 16 for one in hashes)
    assert hashed(cache, [9, *tokens[1:]])[1] != hashes[1]
    assert hashed(cache, [*tokens[:4], 9, 9, 9, 9])[0] == hashes[0]


def test_hashing_goes_on_where_it_stopped():
    cache = manager()
    tokens = list(range(30))
    hashes = []
    for length in (3, 4, 11, 12, 30):
        cache.hash_blocks(tokens[:length], hashes, b"salt")
    assert hashes == hashed(cache, np.array(tokens, dtype=np.int32), b"salt")


def test_hashing_reads_only_the_tokens_of_new_blocks():
    class Watched(list):
        def __getitem__(self, item):
            assert item == slice(8, 12)
            return super().__getitem__(item)

    cache = manager()
    hashes = hashed(cache, list(range(8)))
    cache.hash_blocks(Watched(range(14)), hashes, b"")
    assert hashes == hashed(cache, list(range(12)))


def test_a_salt_keeps_caches_apart():
    cache = manager()
    tokens = list(range(12))
    run(cache, 0, tokens, salt=b"one tenant")
    assert cache.match(hashed(cache, tokens, b"one tenant"), 12) == 8
    assert cache.match(hashed(cache, tokens, b"another"), 12) == 0
    assert cache.match(hashed(cache, tokens), 12) == 0


@pytest.mark.parametrize("layer_types", [FULL, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize(("num_tokens", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_hit_leaves_at_least_one_token_to_compute(layer_types, num_tokens, cached):
    cache = manager(layer_types)
    tokens = list(range(20))
    run(cache, 0, tokens)
    assert cache.match(hashed(cache, tokens[:num_tokens]), num_tokens) == cached


def test_a_request_of_the_same_step_hits_what_another_has_only_scheduled():
    cache = manager()
    hashes = run(cache, 0, list(range(12)))
    assert cache.match(hashes, 13) == 12
    cache.admit(1, hashes, 12)
    assert cache.block_tables[0][1, :3].tolist() == cache.block_tables[0][0, :3].tolist()
    assert cache.capacity.tolist() == [12, 12, 0, 0]
    assert cache.num_referenced == 3
    cache.check()


def test_sharing_costs_nothing_and_taking_idle_blocks_costs_them():
    cache = manager()
    hashes = run(cache, 0, list(range(12)))
    assert cache.can_admit(hashes, 12, 17) == 2
    cache.release(0)
    assert cache.can_admit(hashes, 12, 17) == 5
    before = cache.num_free
    cache.admit(1, hashes, 12)
    cache.grow(1, 17)
    assert before - cache.num_free == 5


def test_a_released_prefix_is_found_again():
    cache = manager()
    hashes = run(cache, 0, list(range(12)))
    row = cache.block_tables[0][0, :3].tolist()
    cache.release(0)
    assert (cache.num_free, cache.num_cached) == (cache.num_total, 3)
    assert not cache.block_tables[0].any()
    cache.admit(2, hashes, cache.match(hashes, 13))
    assert cache.block_tables[0][2, :3].tolist() == row


def test_releasing_a_free_slot_changes_nothing():
    cache = manager(MIXED)
    cache.release(0)
    cache.discard(0, 0)
    assert cache.num_free == cache.num_total
    cache.check()


def test_a_hybrid_hit_needs_only_what_the_window_reaches():
    cache = manager(MIXED, window=6)
    hashes = run(cache, 0, list(range(20)))
    cache.trim(0, 20)
    # The next query at 20 reads from 15 on: the sliding groups hold blocks 3 and 4 alone.
    assert [np.count_nonzero(table[0]) for table in cache.block_tables] == [5, 2, 2]
    cache.release(0)
    assert cache.match(hashes, 21) == 20
    cache.admit(1, hashes, 20)
    assert [np.count_nonzero(table[1]) for table in cache.block_tables] == [5, 2, 2]
    assert cache.block_tables[1][1, :3].tolist() == [0, 0, 0]
    cache.check()


def test_a_hybrid_hit_ends_where_a_window_is_whole():
    cache = manager(MIXED, window=6)
    hashes = run(cache, 0, list(range(20)))
    cache.discard(0, 4)
    # All groups have blocks 0 to 3; a hit of 16 tokens reads from position 11 on, that is blocks 2 and 3.
    assert cache.match(hashes, 21) == 16
    cache._pool.forget(cache._pool.find((2, hashes[2])))
    # Now hits of 16 and of 12 tokens (from 7 on: blocks 1 and 2) lack block 2; 8 tokens need blocks 0 and 1.
    assert cache.match(hashes, 21) == 8
    cache._pool.forget(cache._pool.find((1, hashes[0])))
    assert cache.match(hashes, 21) == 0


def test_a_hybrid_hit_needs_the_full_groups_from_the_start():
    cache = manager(MIXED, window=6)
    hashes = run(cache, 0, list(range(20)))
    cache.discard(0, 5)
    cache._pool.forget(cache._pool.find((0, hashes[3])))
    assert cache.match(hashes, 21) == 12


def test_a_window_of_one_token_needs_nothing_cached_in_its_groups():
    cache = manager(MIXED, window=1)
    hashes = run(cache, 0, list(range(12)))
    cache.trim(0, 12)
    cache.release(0)
    cache.admit(1, hashes, cache.match(hashes, 13))
    assert [np.count_nonzero(table[1]) for table in cache.block_tables] == [3, 0, 0]
    assert cache.grow(1, 13)
    assert [np.count_nonzero(table[1]) for table in cache.block_tables] == [4, 1, 1]
    cache.check()


def test_every_group_grows_or_none_does():
    cache = manager(MIXED, num_blocks=9)
    cache.admit(0, [], 0)
    assert cache.grow(0, 8)
    before = [table.copy() for table in cache.block_tables]
    assert not cache.grow(0, 9)
    assert cache.num_free == 2
    for table, copy in zip(cache.block_tables, before, strict=True):
        np.testing.assert_array_equal(table, copy)
    assert cache.capacity[0] == 8
    cache.check()


def test_growing_within_the_blocks_takes_nothing():
    cache = manager()
    cache.admit(0, [], 0)
    cache.grow(0, 5)
    free = cache.num_free
    assert cache.grow(0, 8)
    assert cache.grow(0, 3)
    assert cache.num_free == free
    assert cache.capacity[0] == 8


def test_rows_due_for_a_trim_are_found_all_at_once():
    cache = manager(MIXED, window=6, num_blocks=46)
    for slot in range(3):
        cache.admit(slot, [], 0)
        assert cache.grow(slot, 20)
    slots, computed = np.array([0, 1, 2], np.int32), np.array([8, 9, 20], np.int32)
    assert cache.trim_due(slots, computed).tolist() == [False, True, True]
    cache.trim(1, 9)
    assert cache.trim_due(slots, computed).tolist() == [False, False, True]
    assert cache.num_referenced == 3 * 15 - 2


def test_full_attention_alone_is_never_due_for_a_trim():
    cache = manager()
    cache.admit(0, [], 0)
    cache.grow(0, 60)
    assert cache.trim_due(np.array([0], np.int32), np.array([60], np.int32)).tolist() == [False]


def test_a_failed_steps_blocks_are_not_found_even_while_another_holds_them():
    cache = manager()
    hashes = run(cache, 0, list(range(12)))
    cache.admit(1, hashes, 12)
    cache.discard(0, 1)
    assert cache.match(hashes, 13) == 4
    cache.release(1)
    assert cache.match(hashes, 13) == 4
    assert cache.num_free == cache.num_total
    cache.check()


def test_under_pressure_all_groups_lose_the_same_tail():
    cache = manager(MIXED, window=60, num_blocks=16)
    hashes = run(cache, 0, list(range(20)))
    cache.release(0)
    cache.admit(1, [], 0)
    assert cache.grow(1, 8)
    assert cache.match(hashes, 21) == 12


def test_idle_cached_blocks_can_be_evicted_by_hand():
    cache = manager()
    hashes = run(cache, 0, list(range(12)))
    run(cache, 1, list(range(100, 108)))
    cache.release(0)
    assert cache.evict_cached(1) == 1
    assert cache.match(hashes, 13) == 8
    assert cache.evict_cached() == 2
    assert (cache.num_cached, cache.match(hashes, 13), cache.num_referenced) == (0, 0, 2)


def test_without_a_prefix_cache_nothing_is_found():
    cache = manager(prefix_cache=False)
    hashes = run(cache, 0, list(range(12)))
    assert cache.match([b"x" * 16] * 3, 13) == 0
    cache.release(0)
    assert (hashes, cache.num_cached) == ([], 0)


def test_usage_counts_what_is_held():
    cache = manager(num_blocks=11)
    run(cache, 0, list(range(8)))
    assert cache.usage == pytest.approx(0.2)
    cache.release(0)
    assert cache.usage == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda cache: cache.block_tables[0].__setitem__((0, 0), 0), id="a hole in a row"),
        pytest.param(lambda cache: cache.block_tables[0].__setitem__((1, 0), 1), id="a block in a free row"),
        pytest.param(lambda cache: cache.capacity.__setitem__(0, 40), id="capacity without blocks"),
        pytest.param(lambda cache: cache.allocators[1].free_blocks(0), id="one group freed alone"),
    ],
)
def test_check_finds_damage(damage):
    cache = manager(MIXED)
    run(cache, 0, list(range(12)))
    cache.check()
    damage(cache)
    with pytest.raises(AssertionError):
        cache.check()
