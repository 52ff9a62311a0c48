"""The attention kernels' tiles: what they need of a card, by arithmetic and by the compiler's word."""

from __future__ import annotations

import pytest

from pagedserve_engine.attention.triton_tiles import (
    MAX_SPLITS,
    SHARED_LIMIT,
    decode_tiles,
    num_splits,
    prefill_tiles,
)

pytest.importorskip("triton")

SPILLED = 64
"""Bytes of a thread's stack that a kernel may spill."""

DECODE = [(80, 64, "u8"), (80, 256, "bf16"), (90, 128, "bf16"), (90, 128, "fp8e4nv")]
PREFILL = [(80, 128, "bf16"), (80, 256, "bf16"), (90, 128, "bf16"), (90, 256, "fp8e4nv")]


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("head", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("bytes_each", [2, 4])
def test_tiles_fit_into_the_shared_memory_of_their_cards(major: int, head: int, group: int, bytes_each: int) -> None:
    for tiles in (decode_tiles(major, head, group, bytes_each), prefill_tiles(major, head, group, bytes_each)):
        assert tiles.rows >= group
        assert tiles.shared_bytes(head, bytes_each, bytes_each) <= SHARED_LIMIT[major]
        if bytes_each == 2:
            assert tiles.shared_bytes(head, 1) <= SHARED_LIMIT[major]


@pytest.mark.parametrize(("rows", "splits"), [(1, 64), (8, 8), (32, 2), (128, 1), (4096, 1), (0, 64)])
def test_small_batches_share_the_keys_of_a_row(rows: int, splits: int) -> None:
    assert num_splits(rows, 8, 132) == splits


def test_no_batch_asks_for_more_shares_than_there_may_be() -> None:
    assert num_splits(1, 1, 10_000) == MAX_SPLITS


def attention_constants(head: int, *, windowed: bool) -> dict[str, object]:
    return {
        "GROUP": 4,
        "KV_HEADS": 8,
        "HEAD_DIM": head,
        "BLOCK_SIZE": 32,
        "D": head,
        "WINDOWED": windowed,
        "CAPPED": windowed,
        "FLOAT32_DOT": False,
    }


@pytest.mark.parametrize(("capability", "head", "cache"), DECODE)
def test_decoding_compiles_for_its_cards_within_their_memory(capability: int, head: int, cache: str) -> None:
    from pagedserve_engine.attention.triton_kernels import decode_kernel
    from triton_compiling import compile_kernel

    tiles = decode_tiles(capability // 10, head, 4, 2)
    taken = compile_kernel(
        decode_kernel,
        capability,
        {**attention_constants(head, windowed=False), "M": tiles.rows, "N": tiles.keys, "SPLIT": True},
        types={"keys": f"*{cache}", "values": f"*{cache}"},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    cache_bytes = 2 if cache == "bf16" else 1
    # What is copied ahead of its use: two tiles of keys and of values, where the table says three steps.
    ahead = (tiles.num_stages - 1) * 2 * tiles.keys * head * cache_bytes
    assert ahead <= taken.shared <= tiles.shared_bytes(head, cache_bytes)
    assert taken.spilled <= SPILLED


@pytest.mark.parametrize(("capability", "head", "cache"), PREFILL)
def test_chunks_compile_for_their_cards_within_their_memory(capability: int, head: int, cache: str) -> None:
    from pagedserve_engine.attention.triton_prefill import prefill_kernel
    from triton_compiling import compile_kernel

    tiles = prefill_tiles(capability // 10, head, 4, 2)
    taken = compile_kernel(
        prefill_kernel,
        capability,
        {**attention_constants(head, windowed=head == 256), "M": tiles.rows, "N": tiles.keys},
        types={"keys": f"*{cache}", "values": f"*{cache}"},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    assert taken.shared <= tiles.shared_bytes(head, 2 if cache == "bf16" else 1)
    assert taken.spilled <= SPILLED
