"""The cache's bookkeeping over all layer groups: every group gets its blocks, or none does.

The scheduler calls it for each request and step. Rows that stay within their blocks cost nothing here: the scheduler
compares ``capacity`` and asks ``trim_due`` for all rows at once, and calls only for those that cross a border.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from pagedserve_engine.cache.full import FullAllocator
from pagedserve_engine.cache.layout import CacheLayout, Int32Array, LayerGroup
from pagedserve_engine.cache.pool import NULL_BLOCK, BlockPool
from pagedserve_engine.cache.sliding import SlidingAllocator

_HASH_BYTES = 16


class CacheManager:
    """Blocks of up to ``max_num_seqs`` sequences (slots) of up to ``max_model_len`` tokens from one pool."""

    block_tables: tuple[Int32Array, ...]
    """For each group int32 [max_num_seqs, blocks by position]; 0, the null block, where nothing is held."""
    capacity: Int32Array
    """int32 [max_num_seqs]: tokens that a slot's blocks can hold, 0 where the slot is free."""

    def __init__(
        self, layout: CacheLayout, *, num_blocks: int, max_num_seqs: int, max_model_len: int, prefix_cache: bool = True
    ) -> None:
        self.layout = layout
        self._block_size = layout.block_size
        self._prefix_cache = prefix_cache
        self._pool = BlockPool(num_blocks)
        shape = (max_num_seqs, layout.max_blocks_per_sequence(max_model_len))
        self.block_tables = tuple(np.zeros(shape, dtype=np.int32) for _ in layout.groups)
        self.capacity = np.zeros(max_num_seqs, dtype=np.int32)
        self.allocators = tuple(
            self._allocator(group, table) for group, table in zip(layout.groups, self.block_tables, strict=True)
        )
        """One for each group, in the groups' order."""
        self._sliding = [allocator for allocator in self.allocators if isinstance(allocator, SlidingAllocator)]
        self._full = [allocator for allocator in self.allocators if allocator not in self._sliding]

    @property
    def finds_prefixes(self) -> bool:
        """Whether there is a prefix cache."""
        return self._prefix_cache

    @property
    def num_free(self) -> int:
        """Blocks that no slot holds, cached ones among them."""
        return self._pool.num_free

    @property
    def num_referenced(self) -> int:
        """Blocks that slots hold, shared ones counted once."""
        return self._pool.num_referenced

    @property
    def num_cached(self) -> int:
        """Free blocks whose content a later request may find."""
        return self._pool.num_cached

    @property
    def num_total(self) -> int:
        """Blocks of the pool, the null block not counted: always free + referenced."""
        return self._pool.num_total

    @property
    def usage(self) -> float:
        """Referenced ÷ total."""
        return self._pool.num_referenced / self._pool.num_total

    def hash_blocks(self, token_ids: Sequence[int] | Int32Array, hashes: list[bytes], salt: bytes = b"") -> None:
        """Append the chained hashes of the full blocks of ``token_ids`` that ``hashes`` lacks.

        Reads only the tokens of these blocks. Different salts give different chains. Nothing without a prefix cache.
        """
        size = self._block_size
        start, stop = len(hashes), len(token_ids) // size
        if start >= stop or not self._prefix_cache:
            return
        parent = hashes[-1] if hashes else blake2b(salt, digest_size=_HASH_BYTES, person=b"pagedserve salt").digest()
        data = np.asarray(token_ids[start * size : stop * size], dtype=np.int32).tobytes()
        width = len(data) // (stop - start)
        for offset in range(0, len(data), width):
            parent = blake2b(parent + data[offset : offset + width], digest_size=_HASH_BYTES).digest()
            hashes.append(parent)

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> int:
        """Tokens that a request of ``num_tokens`` known tokens would find cached in every group.

        A multiple of the block size and at most ``num_tokens`` - 1: a hit leaves at least one token to compute.
        """
        if not self._prefix_cache:
            return 0
        hit = min(len(hashes), (num_tokens - 1) // self._block_size)
        for allocator in self._full:
            hit = next((block for block in range(hit) if not allocator.has(hashes[block])), hit)
        if self._sliding:
            hit = self._fit_windows(hashes, hit)
        return hit * self._block_size

    def can_admit(self, hashes: Sequence[bytes], num_cached: int, num_tokens: int) -> int:
        """Blocks by which ``num_free`` falls when a request with a hit of ``num_cached`` tokens is admitted and grown.

        Those that ``num_tokens`` tokens need anew, and those of the hit that are free now.
        """
        lacking = max(0, -(-num_tokens // self._block_size) - num_cached // self._block_size)
        if num_cached == 0:
            return lacking * len(self.allocators)
        return sum(lacking + allocator.idle_hits(hashes, num_cached) for allocator in self.allocators)

    def admit(self, slot: int, hashes: Sequence[bytes], num_cached: int) -> None:
        """Take the blocks of a hit that ``match`` reported, with nothing changed since, into a free slot."""
        for allocator in self.allocators:
            allocator.adopt(slot, hashes, num_cached)
        self.capacity[slot] = num_cached

    def grow(self, slot: int, num_tokens: int) -> bool:
        """Hold ``num_tokens`` tokens in every group; False, and nothing changed, where blocks are too few."""
        # All groups hold up to the same position; they differ in where they begin.
        lacking = self.allocators[0].blocks_needed(slot, num_tokens)
        if lacking == 0:
            return True
        blocks = self._pool.allocate(lacking * len(self.allocators))
        if blocks is None:
            return False
        for index, allocator in enumerate(self.allocators):
            allocator.append(slot, blocks[index * lacking : (index + 1) * lacking])
        self.capacity[slot] += lacking * self._block_size
        return True

    def seal(self, slot: int, hashes: Sequence[bytes], start_block: int, stop_block: int) -> None:
        """Make full blocks findable, when a step schedules the tokens that fill them.

        A request of the same step may hit them already: each layer writes the keys and values of the whole step
        before attention reads.
        """
        if not self._prefix_cache:
            return
        for allocator in self.allocators:
            allocator.register(slot, hashes, start_block, stop_block)

    def trim_due(self, slots: Int32Array, num_computed: Int32Array) -> npt.NDArray[np.bool_]:
        """Which of the slots ``trim`` would take something from: bool [rows]; never any without sliding groups."""
        if not self._sliding:
            return np.zeros(len(slots), dtype=np.bool_)
        # One window for all sliding groups, so they all begin at the same block.
        return self._sliding[0].trim_due(slots, num_computed)

    def trim(self, slot: int, num_computed: int) -> None:
        """Give back the blocks that left the sliding windows of a slot with ``num_computed`` tokens computed."""
        for allocator in self._sliding:
            allocator.trim(slot, num_computed)

    def release(self, slot: int) -> None:
        """Free the slot and its blocks; what is sealed can be found until it is reused, the tail first."""
        held = [allocator.detach(slot) for allocator in self.allocators]
        # A hit needs all groups, so they lose the same position together.
        by_position = zip_longest(*held, fillvalue=NULL_BLOCK)
        self._pool.release(block for position in by_position for block in position if block != NULL_BLOCK)
        self.capacity[slot] = 0

    def discard(self, slot: int, first_block: int) -> None:
        """Release the slot and let nothing find its blocks from ``first_block`` on: a failed step never wrote them.

        Blocks that another slot holds too lose their hash as well.
        """
        for allocator in self.allocators:
            allocator.forget(slot, first_block)
        self.release(slot)

    def evict_cached(self, count: int | None = None) -> int:
        """Forget the ``count`` oldest cached blocks, all by default; returns how many it were."""
        return self._pool.evict_cached(count)

    def check(self) -> None:
        """Prove that every block is accounted for, in the pool and in the tables; AssertionError if not."""
        self._pool.check()
        flat = np.concatenate([table.ravel() for table in self.block_tables])
        holds = np.bincount(flat, minlength=self.num_total + 1)
        for block in range(1, self.num_total + 1):
            assert holds[block] == self._pool.ref_count(block), f"block {block}: in {holds[block]} places of the tables"
        for slot in range(len(self.capacity)):
            ends = {allocator.num_blocks(slot) for allocator in self.allocators}
            assert ends == {int(self.capacity[slot]) // self._block_size}, f"slot {slot}: groups end at {ends}"
            for allocator in self.allocators:
                allocator.check(slot)

    def _allocator(self, group: LayerGroup, table: Int32Array) -> FullAllocator:
        if group.window is None:
            return FullAllocator(self._pool, table, group=group.index, block_size=self._block_size)
        return SlidingAllocator(self._pool, table, group=group.index, block_size=self._block_size, window=group.window)

    def _fit_windows(self, hashes: Sequence[bytes], hit: int) -> int:
        """The most blocks, up to ``hit``, at whose end every sliding group finds all that the window reaches."""
        block = hit
        while block > self._sliding[0].first_block(hit * self._block_size):
            block -= 1
            if not all(allocator.has(hashes[block]) for allocator in self._sliding):
                # A window that ends later and begins no later would reach this block too.
                hit = block
        return hit
