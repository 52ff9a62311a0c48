"""The paged attention kernels against the loop over rows, queries and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_oracle import Row, Shape, compare, group_inputs
from pagedserve_engine.attention.interface import LayerCall
from pagedserve_engine.attention.triton import TritonBackend
from triton_device import DEVICE, on_the_device

pytestmark = on_the_device

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

MIXED: list[Row] = [(37, 1), (0, 1), (131, 1), (0, 5), (19, 40), (64, 7), (3, 1)]
FP8 = torch.float8_e4m3fn


def check(rows: list[Row], *, splits: int | None = None, **shape: object) -> None:
    described = Shape(**{"head_dim": 16, "device": DEVICE, **shape})  # type: ignore[arg-type]
    ours, expected = compare(TritonBackend(DEVICE, splits=splits), rows, described)
    tolerance = TOLERANCE[described.dtype]
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_shares_of_a_row_add_up_whether_or_not_they_have_keys(splits: int) -> None:
    check([(0, 1), (1, 1), (31, 1), (32, 1), (100, 1), (300, 1)], splits=splits)


def test_more_shares_than_the_reduction_takes_at_once_add_up() -> None:
    check([(5, 1), (700, 1)], splits=32)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("window", [1, 5, 32, 70])
def test_a_window_hides_what_is_older(window: int, splits: int) -> None:
    check(MIXED, splits=splits, window=window)


def test_scores_are_capped() -> None:
    check(MIXED, softcap=2.0)
    check(MIXED, softcap=2.0, window=9, splits=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (3, 1), (7, 1), (16, 2), (20, 1)])
def test_query_heads_that_share_a_key_head_stand_side_by_side(heads: int, kv_heads: int) -> None:
    check(MIXED, heads=heads, kv_heads=kv_heads, splits=2)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_heads_of_any_size_attend(head_dim: int) -> None:
    check([(37, 1), (70, 1), (19, 10)], head_dim=head_dim, splits=2, scaling=head_dim**-0.5)


@pytest.mark.parametrize("block_size", [8, 16, 32, 48, 1])
def test_blocks_of_any_size_are_read(block_size: int) -> None:
    check(MIXED, block_size=block_size, splits=2, window=33)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [None, FP8])
def test_numbers_of_16_and_8_bits_are_read(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    check(MIXED, dtype=dtype, cache_dtype=cache_dtype, head_dim=64, scaling=0.1)


@pytest.mark.parametrize("context", [0, 1, 31, 32, 33, 95])
def test_a_chunk_may_begin_anywhere(context: int) -> None:
    check([(context, 140)], heads=2, kv_heads=1)


def test_many_chunks_find_their_rows() -> None:
    check([(7 * row % 5, 2 + row % 3) for row in range(260)], heads=1, kv_heads=1)


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_rows_attends_as_the_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(int(rng.integers(81)), int(rng.integers(1, 21))) for _ in range(rng.integers(1, 6))]
    window, splits = (None, 1 + int(rng.integers(60)))[seed % 2], (None, 1, 4)[seed % 3]
    check(rows, block_size=int(rng.choice([3, 8, 32])), window=window, splits=splits)


def test_a_query_may_lie_between_others() -> None:
    """As one part of a fused projection, its rows and heads further apart than they are long."""
    table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    backend = TritonBackend(DEVICE)
    step = backend.plan_group(group_inputs(table.numpy(), [(9, 1), (3, 6)], num_decodes=1, block_size=8, device=DEVICE))
    wide = torch.randn(7, 6, 16, device=DEVICE)
    pages = torch.randn(2, 5, 8, 2, 16, device=DEVICE)
    outs = [
        step.attend(LayerCall(query=query, keys=pages[0], values=pages[1], scaling=0.3, softcap=None))
        for query in (wide[:, :4], wide[:, :4].contiguous())
    ]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_a_step_planned_from_tensors_serves_the_lengths_they_hold_later(splits: int, window: int | None) -> None:
    columns = 8
    table = torch.zeros(4, columns + 3, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    writes = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    backend = TritonBackend(DEVICE, splits=splits)
    step = backend.plan_decode(table[:, :columns], seq_lens, writes, window=window, block_size=8)
    pages = torch.randn(2, 40, 8, 2, 16, device=DEVICE)
    pages[:, 0] = float("nan")
    query = torch.randn(4, 4, 16, device=DEVICE)
    call = LayerCall(query=query, keys=pages[0], values=pages[1], scaling=0.3, softcap=None)
    assert not step.attend(call).any()
    lengths = [50, 0, 7, 33]
    table[:, :columns] = torch.arange(1, 4 * columns + 1, dtype=torch.int32).view(4, columns)
    seq_lens.copy_(torch.tensor(lengths))
    out = step.attend(call)
    assert not out[1].any()
    for row in (0, 2, 3):
        inputs = group_inputs(
            table[row : row + 1, :columns].cpu().numpy(),
            [(lengths[row] - 1, 1)],
            num_decodes=1,
            block_size=8,
            window=window,
            device=DEVICE,
        )
        alone = LayerCall(query=query[row : row + 1], keys=pages[0], values=pages[1], scaling=0.3, softcap=None)
        torch.testing.assert_close(backend.plan_group(inputs).attend(alone)[0], out[row])
