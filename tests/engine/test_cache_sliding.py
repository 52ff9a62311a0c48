import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.cache.pool import BlockPool
from pagedserve_engine.cache.sliding import SlidingAllocator


def allocator(window, *, block_size=4, num_blocks=40, slots=2, width=30):
    pool = BlockPool(num_blocks)
    table = np.zeros((slots, width), dtype=np.int32)
    return pool, SlidingAllocator(pool, table, group=0, block_size=block_size, window=window)


@pytest.mark.parametrize(
    ("window", "num_computed", "first_held"),
    [
        pytest.param(4, 4, 0, id="window = block, next query at 4 reads 1 to 4"),
        pytest.param(4, 6, 0, id="the query at 6 reads position 3, the first block's last"),
        pytest.param(4, 7, 1, id="the query at 7 reads from position 4 on"),
        pytest.param(3, 5, 0, id="window = block - 1: the query at 5 reads position 3"),
        pytest.param(3, 6, 1, id="window = block - 1: the query at 6 reads from 4 on"),
        pytest.param(5, 7, 0, id="window = block + 1: the query at 7 reads position 3"),
        pytest.param(5, 8, 1, id="window = block + 1: the query at 8 reads from 4 on"),
        pytest.param(1, 3, 0, id="a window of the query alone: its own block is written"),
        pytest.param(1, 4, 1, id="a window of the query alone, at a border"),
        pytest.param(2, 4, 0, id="a window of two reaches over a border"),
        pytest.param(100, 20, 0, id="a window longer than the sequence"),
    ],
)
def test_a_block_goes_back_exactly_when_no_later_query_reads_it(window, num_computed, first_held):
    pool, sliding = allocator(window)
    sliding.allocate_blocks(0, 21)
    assert sliding.trim(0, num_computed) == first_held
    assert np.flatnonzero(sliding.table[0]).tolist() == list(range(first_held, 6))
    assert pool.num_referenced == 6 - first_held
    sliding.check(0)


def test_trimming_twice_gives_back_once():
    pool, sliding = allocator(4)
    sliding.allocate_blocks(0, 21)
    assert (sliding.trim(0, 12), sliding.trim(0, 12), sliding.trim(0, 7)) == (2, 0, 0)
    assert pool.num_referenced == 4


@given(st.integers(1, 12), st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_every_key_of_the_window_is_held_and_nothing_more_than_a_block_behind(window, block_size, chunks):
    pool, sliding = allocator(window, block_size=block_size, num_blocks=200, width=120)
    computed = 0
    for chunk in chunks:
        slots, tokens = np.array([0], np.int32), np.array([computed], np.int32)
        due = bool(sliding.trim_due(slots, tokens)[0])
        assert due == (sliding.trim(0, computed) > 0)
        assert sliding.allocate_blocks(0, computed + chunk)
        needed = {
            position for query in range(computed, computed + chunk) for position in range(query - window + 1, query + 1)
        }
        expected = sorted(position for position in needed if position >= 0)
        table = sliding.table[0]
        assert all(table[position // block_size] for position in expected)
        assert np.flatnonzero(table)[0] == min(expected[0], computed) // block_size
        pages = [table[position // block_size] * block_size + position % block_size for position in expected]
        assert sliding.get_read_indices(0, computed + chunk, chunk).tolist() == pages
        seqlens = sliding.get_seqlens_k(np.array([computed + chunk]), np.array([chunk]))
        assert seqlens.tolist() == [len(pages)]
        assert sliding.get_write_indices(0, computed, computed + chunk).tolist() == pages[-chunk:]
        computed += chunk
        sliding.check(0)
        pool.check()
    sliding.free_blocks(0)
    assert pool.num_free == pool.num_total
    assert not sliding.table.any()


def test_rows_are_asked_all_at_once():
    _, sliding = allocator(4)
    for slot in (0, 1):
        sliding.allocate_blocks(slot, 21)
    slots = np.array([1, 0], np.int32)
    assert sliding.trim_due(slots, np.array([7, 6], np.int32)).tolist() == [True, False]
    sliding.trim(1, 7)
    assert sliding.trim_due(slots, np.array([7, 7], np.int32)).tolist() == [False, True]


def test_a_reused_slot_begins_anew():
    _, sliding = allocator(4)
    sliding.allocate_blocks(0, 21)
    sliding.trim(0, 20)
    sliding.free_blocks(0)
    sliding.allocate_blocks(0, 5)
    assert np.flatnonzero(sliding.table[0]).tolist() == [0, 1]
    assert sliding.trim(0, 5) == 0
    sliding.check(0)
