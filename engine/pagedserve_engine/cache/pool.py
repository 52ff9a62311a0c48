"""Ids of blocks: who holds one, which can be found again by their content, and which goes next.

Plain lists and an OrderedDict, because the calls are many and small: a counter in a list is a dozen times cheaper to
touch than one in a numpy array, and OrderedDict beats a linked list written in Python.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from pagedserve_engine.errors import ConfigError

NULL_BLOCK: Final = 0
"""Stands where a sequence holds nothing: never allocated, never counted."""

BlockKey = tuple[int, bytes]
"""(group, chained hash of the tokens up to the block's end): equal keys mean equal content."""


class BlockPool:
    """``num_blocks`` ids, the null block 0 among them; each other block is referenced or free, and always counted.

    A free block is blank (nothing can find it) or cached (found by its key until it is reused, oldest first). Blank
    ones are reused before cached ones.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ConfigError(
                f"NUM_BLOCKS is {num_blocks}: block 0 is reserved, so give at least 2", param="num_blocks"
            )
        self.num_total: Final = num_blocks - 1
        self._ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return len(self._blank) + len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks that somebody holds, each counted once."""
        return self.num_total - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can be found again."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks held once each and without a key; None, and nothing changed, where fewer are free."""
        if count > self.num_free:
            return None
        cut = max(0, len(self._blank) - count)
        blocks = self._blank[cut:]
        del self._blank[cut:]
        blocks.reverse()
        while len(blocks) < count:
            block, _ = self._cached.popitem(last=False)
            self._drop_key(block)
            blocks.append(block)
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def find(self, key: BlockKey) -> int | None:
        """The block with this content, held or cached."""
        return self._block_of.get(key)

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds the block, so that taking it lowers ``num_free``."""
        return self._ref_counts[block] == 0

    def take(self, block: int) -> None:
        """Hold a block that ``find`` returned."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block; what nobody holds any more is free, and reused in the order given."""
        for block in blocks:
            left = self._ref_counts[block] - 1
            assert left >= 0, f"block {block} is released more often than it was taken"
            self._ref_counts[block] = left
            if left:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def register(self, block: int, key: BlockKey) -> None:
        """Make a held block findable; where another has this content already, that one stays the one to find."""
        assert self._ref_counts[block] > 0, f"block {block} is registered but nobody holds it"
        if self._block_of.setdefault(key, block) == block:
            assert self._key_of.setdefault(block, key) == key, f"block {block} has other content already"

    def forget(self, block: int) -> None:
        """Drop the block's key, so that nothing finds it any more; without one, nothing happens."""
        if block not in self._key_of:
            return
        self._drop_key(block)
        if self._ref_counts[block] == 0:
            del self._cached[block]
            self._blank.append(block)

    def evict_cached(self, count: int | None = None) -> int:
        """Make the ``count`` oldest cached blocks blank, all of them by default; returns how many it were."""
        evicted = len(self._cached) if count is None else max(0, min(count, len(self._cached)))
        for _ in range(evicted):
            block, _ = self._cached.popitem(last=False)
            self._drop_key(block)
            self._blank.append(block)
        return evicted

    def ref_count(self, block: int) -> int:
        """How many hold the block."""
        return self._ref_counts[block]

    def check(self) -> None:
        """Prove that every block is in exactly one place and that keys and blocks agree; AssertionError if not."""
        free = self._blank + list(self._cached)
        assert len(set(free)) == len(free), "a block is free twice"
        idle = {block for block, count in enumerate(self._ref_counts) if count == 0 and block != NULL_BLOCK}
        assert set(free) == idle, f"free but held, or lost: {set(free) ^ idle}"
        assert min(self._ref_counts) >= 0, "a reference count is negative"
        assert self._ref_counts[NULL_BLOCK] == 0, "the null block is held"
        assert self.num_free + self.num_referenced == self.num_total
        assert self.num_referenced == sum(1 for count in self._ref_counts if count > 0)
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys and blocks disagree"
        assert all(block in self._key_of for block in self._cached), "a cached block can't be found"
        assert not any(block in self._key_of for block in self._blank), "a blank block can be found"

    def _drop_key(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
