"""The reference attention against a loop over rows, queries and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedserve_engine.attention.interface import LayerCall, PagedStep, paged_attention
from pagedserve_engine.attention.reference import QUERY_SLICE, SEGMENT_KEYS, plan_group
from pagedserve_engine.errors import UnsupportedModelError

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def naive(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, *, window: int | None, call: LayerCall
) -> torch.Tensor:
    """One query [heads, d] at ``position`` over its row's keys [n, kv_heads, d]."""
    first = 0 if window is None else max(0, position - window + 1)
    out = []
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = keys[first : position + 1, kv_head] @ query[head] * call.scaling
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        out.append(torch.softmax(scores, 0) @ values[first : position + 1, kv_head])
    return torch.stack(out)


def run(
    rows: list[tuple[int, int]],
    *,
    block_size: int,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Ours, the loop's) for rows of (context, queries); decoding rows come first."""
    rows = sorted(rows, key=lambda row: row[1] > 1)
    generator = torch.Generator().manual_seed(0)
    widest = max(-(-(context + queries) // block_size) for context, queries in rows)
    order = torch.randperm(len(rows) * widest, generator=generator).numpy() + 1
    table = order.reshape(len(rows), widest).astype(np.int32)
    shape = (len(rows) * widest + 1, block_size, KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn((sum(queries for _, queries in rows), HEADS, HEAD_DIM), generator=generator).to(dtype)
    call = LayerCall(query=query, keys=keys, values=values, scaling=0.3, softcap=softcap)
    step = plan_group(
        table,
        query_lens=np.array([queries for _, queries in rows], np.int32),
        context_lens=np.array([context for context, _ in rows], np.int32),
        num_decodes=sum(queries == 1 for _, queries in rows),
        block_size=block_size,
        window=window,
        device=torch.device("cpu"),
    )
    expected, token = [], 0
    for row, (context, queries) in enumerate(rows):
        row_keys, row_values = (t[torch.from_numpy(table[row])].flatten(0, 1).float() for t in (keys, values))
        for offset in range(queries):
            one = query[token].float()
            expected.append(naive(one, row_keys, row_values, context + offset, window=window, call=call))
            token += 1
    return step.attend(call), torch.stack(expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 8, 32]),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(2.0),
)
def test_any_mix_of_rows_attends_as_the_definition_says(
    rows: list[tuple[int, int]], block_size: int, window: int | None, softcap: float | None
) -> None:
    ours, expected = run(rows, block_size=block_size, window=window, softcap=softcap)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_long_chunk_is_cut_into_slices_without_a_seam() -> None:
    ours, expected = run([(7, QUERY_SLICE + 3)], block_size=16, window=50)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_decoding_rows_of_very_different_lengths_attend_in_segments_that_stay_bounded() -> None:
    contexts = [3, 900, 40, 2000, 901, 5]
    step = plan_group(
        np.ones((len(contexts), 70), np.int32),
        query_lens=np.ones(len(contexts), np.int32),
        context_lens=np.array(contexts, np.int32),
        num_decodes=len(contexts),
        block_size=32,
        window=None,
        device=torch.device("cpu"),
    )
    assert 1 < len(step.segments) < len(contexts)
    assert all(len(segment.blocks) * 32 <= SEGMENT_KEYS for segment in step.segments)
    assert sorted(torch.cat([segment.tokens for segment in step.segments]).tolist()) == list(range(len(contexts)))


def test_half_precision_is_rounded_once_at_the_end() -> None:
    ours, expected = run([(20, 1), (3, 4)], block_size=8, dtype=torch.bfloat16)
    assert ours.dtype is torch.bfloat16
    torch.testing.assert_close(ours, expected.to(torch.bfloat16), atol=1e-2, rtol=1e-2)


class Layer(torch.nn.Module):
    layer_idx = 0


def paged(num_tokens: int) -> PagedStep:
    step = plan_group(
        np.array([[1]], np.int32),
        query_lens=np.array([num_tokens], np.int32),
        context_lens=np.array([0], np.int32),
        num_decodes=0,
        block_size=8,
        window=None,
        device=torch.device("cpu"),
    )
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
