"""Tile sizes and pipeline depths of the attention kernels, by card, head size and width of the numbers.

A plain table: what a kernel is compiled with never depends on a timing at run time. A test computes the shared memory
of each entry and compiles it for both generations of cards.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one kernel is cut and compiled."""

    rows: int
    """Query rows of a program: queries times the query heads that share a key head."""
    keys: int
    """Keys of a loop step."""
    num_warps: int
    num_stages: int
    """Loop steps in flight, the one at work counted."""

    def shared_bytes(self, head: int, cache_bytes: int, query_bytes: int = 2) -> int:
        """Shared memory that the pipeline, the queries and the widened keys and values of a step take at most."""
        pipeline = max(self.num_stages, 1) * 2 * self.keys * head * cache_bytes
        widened = 0 if cache_bytes == query_bytes else 2 * self.keys * head * query_bytes
        return pipeline + widened + self.rows * head * query_bytes


SHARED_LIMIT = {8: 99 << 10, 9: 227 << 10}
"""Bytes of shared memory that a program may take: on the least card of generation 8 (8.6 and 8.9), and on 9.0."""


MIN_ROWS = 16
"""The least rows of a product on tensor cores."""

_DECODE = {
    (8, 64): Tiles(MIN_ROWS, 64, 4, 3),
    (8, 128): Tiles(MIN_ROWS, 32, 4, 3),
    (8, 256): Tiles(MIN_ROWS, 32, 4, 2),
    (9, 64): Tiles(MIN_ROWS, 128, 4, 3),
    (9, 128): Tiles(MIN_ROWS, 64, 4, 3),
    (9, 256): Tiles(MIN_ROWS, 32, 4, 3),
}

_PREFILL = {
    (8, 64): Tiles(128, 64, 8, 3),
    (8, 128): Tiles(128, 32, 8, 3),
    (8, 256): Tiles(64, 32, 8, 2),
    (9, 64): Tiles(128, 128, 8, 3),
    (9, 128): Tiles(128, 64, 8, 3),
    (9, 256): Tiles(128, 32, 8, 2),
}

_WIDE = Tiles(MIN_ROWS, 32, 4, 1)
"""float32 is for tests and for cards without 16-bit products; nothing is tuned for it."""


def decode_tiles(major: int, head: int, group: int, dtype_bytes: int) -> Tiles:
    """For rows of one query, ``group`` query heads to a key head of ``head`` numbers (a power of two)."""
    tiles = _WIDE if dtype_bytes > 2 else _DECODE[_generation(major), _bucket(head)]
    rows = max(MIN_ROWS, 1 << (group - 1).bit_length())
    return Tiles(rows, tiles.keys, tiles.num_warps, tiles.num_stages)


def prefill_tiles(major: int, head: int, group: int, dtype_bytes: int) -> Tiles:
    """For rows of several queries; ``group`` as above."""
    tiles = _WIDE if dtype_bytes > 2 else _PREFILL[_generation(major), _bucket(head)]
    rows = max(tiles.rows, 1 << (group - 1).bit_length())
    return Tiles(rows, tiles.keys, tiles.num_warps, tiles.num_stages)


MAX_SPLITS = 64
"""Programs that share the keys of one row and key head, at most."""

_PROGRAMS_PER_PROCESSOR = 4
"""Decode programs wanted for each multiprocessor: two run at once, and as many wait to even out unequal lengths."""


def num_splits(rows: int, kv_heads: int, processors: int) -> int:
    """How many programs share a row's keys: a power of two from the batch alone, so that a graph serves any lengths."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors / max(rows * kv_heads, 1)
    splits = 1
    while splits * 2 <= min(wanted, MAX_SPLITS):
        splits *= 2
    return splits


def _generation(major: int) -> int:
    # 12.x has as little shared memory as 8.6 has.
    return 9 if major in (9, 10) else 8


def _bucket(head: int) -> int:
    return max(64, head)
