"""Blocks of sliding-window layers: a sequence gives back the blocks that no later query can see.

A window of w tokens counts the current one: the query at position p sees keys p - w + 1 to p. So once ``c`` tokens are
computed, the next query stands at c and the first key still needed is c - w + 1; a block goes back when its last
position lies before that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagedserve_engine.cache.full import FullAllocator
from pagedserve_engine.cache.layout import Int32Array
from pagedserve_engine.cache.pool import NULL_BLOCK, BlockPool


class SlidingAllocator(FullAllocator):
    """Allocator of one group with a window (tokens): its rows also begin with null entries, behind the window."""

    def __init__(self, pool: BlockPool, table: Int32Array, *, group: int, block_size: int, window: int) -> None:
        super().__init__(pool, table, group=group, block_size=block_size)
        self._window = window
        self._starts = np.zeros(len(table), dtype=np.int32)
        """First block held by each slot."""

    def first_position(self, num_computed: int) -> int:
        """The first position whose key the query at position ``num_computed`` reads."""
        return max(0, num_computed - self._window + 1)

    def adopt(self, slot: int, hashes: Sequence[bytes], num_cached: int) -> None:
        """Take the blocks of a hit of ``num_cached`` tokens that the window reaches into an empty slot."""
        super().adopt(slot, hashes, num_cached)
        self._starts[slot] = min(self.first_block(num_cached), self.num_blocks(slot))

    def detach(self, slot: int) -> list[int]:
        """Empty the slot and return what it held, the tail first; the caller now owns these holds."""
        self._starts[slot] = 0
        return super().detach(slot)

    def trim(self, slot: int, num_computed: int) -> int:
        """Give back what queries from position ``num_computed`` on don't read; returns how many blocks."""
        start = int(self._starts[slot])
        stop = min(self.first_block(num_computed), self.num_blocks(slot))
        if stop <= start:
            return 0
        left = self.table[slot, start:stop]
        self._pool.release(left.tolist())
        left[:] = NULL_BLOCK
        self._starts[slot] = stop
        return stop - start

    def trim_due(self, slots: Int32Array, num_computed: Int32Array) -> npt.NDArray[np.bool_]:
        """Which of the slots have blocks to give back with so many tokens computed: bool [rows]."""
        due: npt.NDArray[np.bool_] = (num_computed - self._window + 1) // self._block_size > self._starts[slots]
        return due

    def get_seqlens_k(self, num_tokens: Int32Array, query_len: Int32Array) -> Int32Array:
        """Keys that chunks of ``query_len`` tokens ending at ``num_tokens`` read, row by row: int32 [rows]."""
        reach = np.asarray(query_len, dtype=np.int32) + np.int32(self._window - 1)
        seqlens: Int32Array = np.minimum(np.asarray(num_tokens, dtype=np.int32), reach)
        return seqlens

    def _start(self, slot: int) -> int:
        return int(self._starts[slot])
