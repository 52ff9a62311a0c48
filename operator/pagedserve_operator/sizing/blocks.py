"""Block arithmetic: what a block costs and how long a sequence a pool of blocks holds, as the engine reckons it.

Layers of one attention type are split into groups of equally many layers; a block holds ``block_size`` tokens of the
layers of one group, so that one pool serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pagedserve_operator.shapes.model import ModelShape

UNBOUNDED: Final = 2**31 - 1
"""Tokens: the length of a sequence that memory doesn't limit."""
NULL_BLOCK: Final = 1
"""Blocks of the pool that hold no sequence."""
SHORTEST_SEQUENCE: Final = 2
"""Tokens: one of prompt and one of output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A model's blocks on one of ``devices`` devices that share its heads."""

    shape: ModelShape
    block_size: int
    """Tokens of a block."""
    dtype_bytes: int
    """Bytes of one number in the cache."""
    devices: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one device: keys and values."""
        kv_heads = -(-self.shape.kv_heads // self.devices)
        page = self.shape.layers_per_group * kv_heads * self.shape.head_dim * self.dtype_bytes
        return 2 * page * self.block_size

    def needed(self, length: int, batch_tokens: int) -> int:
        """Blocks of a pool that holds one sequence of ``length`` tokens, prefilled in steps of ``batch_tokens``."""
        per_group = self.shape.layers_per_group
        blocks = -(-length // self.block_size)
        total = NULL_BLOCK + self.shape.layer_types.count("full") // per_group * blocks
        if self.shape.sliding_window is None:
            return total
        # A step's first query looks back window - 1 tokens, and a span may begin on the last page of a block.
        span = self.shape.sliding_window - 1 + batch_tokens
        windowed = min(blocks, 1 + -(-(span - 1) // self.block_size))
        return total + self.shape.layer_types.count("sliding") // per_group * windowed

    def smallest(self, batch_tokens: int) -> int:
        """Blocks without which not even the shortest sequence runs."""
        return self.needed(SHORTEST_SEQUENCE, batch_tokens)

    def longest(self, num_blocks: int, batch_tokens: int) -> int:
        """Tokens of the longest sequence that the pool holds alone; UNBOUNDED where the windows alone bound it."""
        if self.needed(UNBOUNDED, batch_tokens) <= num_blocks:
            return UNBOUNDED
        fits, too_long = 0, UNBOUNDED
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.needed(middle, batch_tokens) <= num_blocks:
                fits = middle
            else:
                too_long = middle
        return fits
