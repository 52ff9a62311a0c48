"""Blocks of full-attention layers: a sequence keeps every block that it was given until it ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedserve_engine.cache.layout import Int32Array
from pagedserve_engine.cache.pool import NULL_BLOCK, BlockPool


class FullAllocator:
    """Allocator of one group: ``table`` is its int32 [slots, blocks] block table, changed here alone.

    A row is null, then held from the first block that attention still reads to the end of what was allocated, then
    null. With full attention the first held block is block 0.
    """

    def __init__(self, pool: BlockPool, table: Int32Array, *, group: int, block_size: int) -> None:
        self.table = table
        self._pool = pool
        self._group = group
        self._block_size = block_size
        self._ends = [0] * len(table)
        """Blocks by position up to which each slot holds."""

    def first_position(self, num_computed: int) -> int:
        """The first position whose key the query at position ``num_computed`` reads."""
        return 0

    def first_block(self, num_computed: int) -> int:
        """The first block that queries from position ``num_computed`` on read or write."""
        return self.first_position(num_computed) // self._block_size

    def blocks_needed(self, slot: int, num_tokens: int) -> int:
        """Blocks that the slot lacks to hold ``num_tokens`` tokens."""
        return max(0, -(-num_tokens // self._block_size) - self._ends[slot])

    def allocate_blocks(self, slot: int, num_tokens: int) -> bool:
        """Hold ``num_tokens`` tokens; False, and nothing changed, where the pool has too few free blocks."""
        blocks = self._pool.allocate(self.blocks_needed(slot, num_tokens))
        if blocks is None:
            return False
        self.append(slot, blocks)
        return True

    def append(self, slot: int, blocks: Sequence[int]) -> None:
        """Put held blocks behind those that the slot has."""
        start = self._ends[slot]
        stop = start + len(blocks)
        assert stop <= self.table.shape[1], f"slot {slot} would hold {stop} blocks, a row has {self.table.shape[1]}"
        self._ends[slot] = stop
        if len(blocks) == 1:
            self.table[slot, start] = blocks[0]
        else:
            self.table[slot, start:stop] = blocks

    def has(self, block_hash: bytes) -> bool:
        """Whether a block with this chained hash can be found."""
        return self._pool.find((self._group, block_hash)) is not None

    def idle_hits(self, hashes: Sequence[bytes], num_cached: int) -> int:
        """How many of the blocks that a hit of ``num_cached`` tokens takes are free now."""
        return sum(self._pool.is_idle(block) for block in self._hits(hashes, num_cached))

    def adopt(self, slot: int, hashes: Sequence[bytes], num_cached: int) -> None:
        """Take the blocks of a hit of ``num_cached`` tokens into an empty slot."""
        assert self._ends[slot] == 0, f"slot {slot} is in use"
        blocks = self._hits(hashes, num_cached)
        for block in blocks:
            self._pool.take(block)
        self._ends[slot] = num_cached // self._block_size - len(blocks)
        self.append(slot, blocks)

    def register(self, slot: int, hashes: Sequence[bytes], start_block: int, stop_block: int) -> None:
        """Make the slot's blocks from ``start_block`` to ``stop_block`` findable by their chained hashes."""
        for position in range(start_block, stop_block):
            block = int(self.table[slot, position])
            if block != NULL_BLOCK:
                self._pool.register(block, (self._group, hashes[position]))

    def forget(self, slot: int, first_block: int) -> None:
        """Let nothing find the slot's blocks from ``first_block`` on."""
        for block in self.table[slot, first_block : self._ends[slot]].tolist():
            self._pool.forget(block)

    def detach(self, slot: int) -> list[int]:
        """Empty the slot and return what it held, the tail first; the caller now owns these holds."""
        row = self.table[slot, : self._ends[slot]]
        blocks = [block for block in row[::-1].tolist() if block != NULL_BLOCK]
        row[:] = NULL_BLOCK
        self._ends[slot] = 0
        return blocks

    def free_blocks(self, slot: int) -> None:
        """Empty the slot; its blocks go back to the pool."""
        self._pool.release(self.detach(slot))

    def trim(self, slot: int, num_computed: int) -> int:
        """Give back what queries from position ``num_computed`` on don't read; returns how many blocks: none here."""
        return 0

    def get_read_indices(self, slot: int, num_tokens: int, query_len: int) -> Int32Array:
        """Flat page indices of the keys that the last ``query_len`` of ``num_tokens`` tokens read: int32 [keys].

        A page index is block * block_size + offset.
        """
        return self._pages(slot, self.first_position(num_tokens - query_len), num_tokens)

    def get_write_indices(self, slot: int, start: int, stop: int) -> Int32Array:
        """Flat page indices of the positions from ``start`` to ``stop``: int32 [stop - start]."""
        return self._pages(slot, start, stop)

    def get_seqlens_k(self, num_tokens: Int32Array, query_len: Int32Array) -> Int32Array:
        """Keys that chunks of ``query_len`` tokens ending at ``num_tokens`` read, row by row: int32 [rows]."""
        return np.asarray(num_tokens, dtype=np.int32)

    def check(self, slot: int) -> None:
        """Prove that the slot's row is held where it must be and null elsewhere; AssertionError if not."""
        row, end = self.table[slot], self._ends[slot]
        held = np.flatnonzero(row)
        assert len(held) == 0 or held[-1] == end - 1, f"slot {slot}: ends at {end} but holds {held}"
        assert len(held) == 0 or len(held) == end - held[0], f"slot {slot}: a hole in {row}"
        assert len(set(row[held].tolist())) == len(held), f"slot {slot}: a block twice in {row}"
        assert len(held) == end - self._start(slot), f"slot {slot}: {len(held)} blocks held of {end}"

    def num_blocks(self, slot: int) -> int:
        """Blocks by position up to which the slot holds."""
        return self._ends[slot]

    def _start(self, slot: int) -> int:
        return 0

    def _hits(self, hashes: Sequence[bytes], num_cached: int) -> list[int]:
        stop = num_cached // self._block_size
        blocks = []
        for position in range(min(stop, self.first_block(num_cached)), stop):
            block = self._pool.find((self._group, hashes[position]))
            assert block is not None, f"block {position} is no longer cached: match and admit without a change between"
            blocks.append(block)
        return blocks

    def _pages(self, slot: int, start: int, stop: int) -> Int32Array:
        positions = np.arange(start, stop, dtype=np.int32)
        blocks = self.table[slot, positions // self._block_size]
        pages: Int32Array = blocks * np.int32(self._block_size) + positions % np.int32(self._block_size)
        return pages
