import numpy as np

from pagedserve_engine.cache.full import FullAllocator
from pagedserve_engine.cache.pool import BlockPool


def allocator(num_blocks=8, *, block_size=4, slots=2, width=6):
    pool = BlockPool(num_blocks)
    return pool, FullAllocator(pool, np.zeros((slots, width), dtype=np.int32), group=0, block_size=block_size)


def test_a_begun_block_is_a_whole_block():
    pool, full = allocator()
    assert [full.blocks_needed(0, tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert full.allocate_blocks(0, 5)
    assert pool.num_referenced == 2
    assert full.blocks_needed(0, 8) == 0
    assert full.table[0].tolist().count(0) == 4


def test_growing_keeps_what_was_there():
    _, full = allocator()
    full.allocate_blocks(0, 6)
    before = full.table[0, :2].tolist()
    full.allocate_blocks(0, 13)
    assert full.table[0, :2].tolist() == before
    assert np.count_nonzero(full.table[0]) == 4
    full.check(0)


def test_too_few_blocks_change_nothing():
    pool, full = allocator(4)
    full.allocate_blocks(0, 8)
    before = full.table.copy()
    assert not full.allocate_blocks(1, 8)
    np.testing.assert_array_equal(full.table, before)
    assert pool.num_free == 1


def test_freed_blocks_leave_a_null_row_and_a_full_pool():
    pool, full = allocator()
    full.allocate_blocks(0, 20)
    full.free_blocks(0)
    assert not full.table.any()
    assert pool.num_free == pool.num_total
    full.free_blocks(0)
    assert pool.num_free == pool.num_total
    pool.check()


def test_a_freed_sequence_loses_its_tail_before_its_head():
    pool, full = allocator(4)
    full.allocate_blocks(0, 12)
    row = full.table[0, :3].tolist()
    full.register(0, [b"a", b"b", b"c"], 0, 3)
    full.free_blocks(0)
    assert pool.allocate(3) == row[::-1]


def test_page_indices_follow_the_table():
    _, full = allocator()
    full.table[0, :3] = [5, 2, 7]
    assert full.get_write_indices(0, 3, 6).tolist() == [23, 8, 9]
    assert full.get_read_indices(0, 6, 1).tolist() == [20, 21, 22, 23, 8, 9]
    assert full.get_read_indices(0, 6, 1).dtype == np.int32


def test_every_key_is_read_whatever_the_chunk():
    _, full = allocator()
    seqlens = full.get_seqlens_k(np.array([6, 9], np.int32), np.array([1, 9], np.int32))
    assert seqlens.tolist() == [6, 9]
    assert seqlens.dtype == np.int32


def test_full_attention_never_gives_blocks_back():
    pool, full = allocator()
    full.allocate_blocks(0, 20)
    assert full.trim(0, 20) == 0
    assert pool.num_referenced == 5
