"""The reference attention against a loop over rows, queries and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_oracle import Row, Shape, compare, group_inputs
from pagedserve_engine.attention.interface import PagedStep, paged_attention
from pagedserve_engine.attention.reference import QUERY_SLICE, SEGMENT_KEYS, ReferenceBackend
from pagedserve_engine.errors import UnsupportedModelError
from pagedserve_engine.float8 import FLOAT8

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def check(rows: list[Row], shape: Shape) -> None:
    ours, expected = compare(ReferenceBackend(), rows, shape)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 8, 32]),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(2.0),
)
def test_any_mix_of_rows_attends_as_the_definition_says(
    rows: list[Row], block_size: int, window: int | None, softcap: float | None
) -> None:
    check(rows, Shape(block_size=block_size, window=window, softcap=softcap))


def test_a_long_chunk_is_cut_into_slices_without_a_seam() -> None:
    check([(7, QUERY_SLICE + 3)], Shape(block_size=16, window=50))


def test_decoding_rows_of_very_different_lengths_attend_in_segments_that_stay_bounded() -> None:
    contexts = [3, 900, 40, 2000, 901, 5]
    table = np.ones((len(contexts), 70), np.int32)
    inputs = group_inputs(table, [(context, 1) for context in contexts], num_decodes=len(contexts), block_size=32)
    step = ReferenceBackend().plan_group(inputs)
    assert 1 < len(step.segments) < len(contexts)
    assert all(len(segment.blocks) * 32 <= SEGMENT_KEYS for segment in step.segments)
    assert sorted(torch.cat([segment.tokens for segment in step.segments]).tolist()) == list(range(len(contexts)))


def test_half_precision_is_rounded_once_at_the_end() -> None:
    ours, expected = compare(ReferenceBackend(), [(20, 1), (3, 4)], Shape(dtype=torch.bfloat16))
    torch.testing.assert_close(ours, expected.to(torch.bfloat16), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_8_bit_floats_is_read_exactly(dtype: torch.dtype) -> None:
    shape = Shape(dtype=dtype, cache_dtype=FLOAT8, window=12, softcap=2.0)
    ours, expected = compare(ReferenceBackend(), [(20, 1), (3, 1), (3, 14)], shape)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(ours, expected.to(dtype), atol=tolerance, rtol=tolerance)


class Layer(torch.nn.Module):
    layer_idx = 0


def paged(num_tokens: int) -> PagedStep:
    inputs = group_inputs(np.array([[1]], np.int32), [(0, num_tokens)], num_decodes=0, block_size=8)
    step = ReferenceBackend().plan_group(inputs)
    pages = [torch.zeros(2, 8, KV_HEADS, HEAD_DIM)]
    return PagedStep((step,), ((0, 0),), keys=pages, values=[pages[0].clone()])


def test_keys_and_values_are_written_to_the_cache_before_attention_reads() -> None:
    step = paged(3)
    query = torch.randn(1, HEADS, 3, HEAD_DIM)
    key, value = torch.randn(1, KV_HEADS, 3, HEAD_DIM), torch.randn(1, KV_HEADS, 3, HEAD_DIM)
    out, _ = paged_attention(Layer(), query, key, value, None, paged=step)
    assert out.shape == (1, 3, HEADS, HEAD_DIM)
    torch.testing.assert_close(step.keys[0][1, :3], key[0].transpose(0, 1))
    torch.testing.assert_close(out[0, 0, 0], value[0, 0, 0])


def test_keys_beyond_8_bit_floats_saturate_on_the_way_into_the_cache() -> None:
    step = paged(3)
    step = PagedStep(step.groups, step.places, *([pages[0].to(FLOAT8)] for pages in (step.keys, step.values)))
    key = torch.randn(1, KV_HEADS, 3, HEAD_DIM)
    key[..., 0] = torch.tensor([600.0, -1e6, float("inf")])
    out, _ = paged_attention(Layer(), torch.randn(1, HEADS, 3, HEAD_DIM), key, key, None, paged=step)
    assert out.isfinite().all()
    assert step.keys[0].float()[1, :3, 0, 0].tolist() == [448, -448, 448]
    torch.testing.assert_close(
        step.keys[0].float()[1, :3, :, 1:], key[0].transpose(0, 1)[..., 1:], atol=2**-9, rtol=2**-4
    )


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [({"s_aux": torch.ones(4)}, "s_aux"), ({"is_causal": False}, "not causal"), ({"paged": None}, "keyword arguments")],
)
def test_what_would_change_the_scores_unseen_is_refused(keywords: dict[str, object], reason: str) -> None:
    tensor = torch.randn(1, KV_HEADS, 3, HEAD_DIM)
    with pytest.raises(UnsupportedModelError, match=reason):
        paged_attention(
            Layer(), torch.randn(1, HEADS, 3, HEAD_DIM), tensor, tensor, None, **{"paged": paged(3), **keywords}
        )  # type: ignore[arg-type]
