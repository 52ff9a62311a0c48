"""Attention as a loop over rows, queries and heads, and steps to hold a backend to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagedserve_engine.attention.interface import AttentionBackend, GroupInputs, LayerCall
from pagedserve_engine.batch import Int32Array
from pagedserve_engine.inputs import page_indices

Row = tuple[int, int]
"""Tokens in the cache before the step, and queries."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one layer, and what shapes its scores."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 8
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    """None: as ``dtype``."""
    scaling: float = 0.3
    device: str = "cpu"


def group_inputs(
    table: Int32Array,
    rows: Sequence[Row],
    *,
    num_decodes: int,
    block_size: int,
    window: int | None = None,
    device: str = "cpu",
) -> GroupInputs:
    """The step of ``rows``, decoding ones first, whose blocks ``table`` [R, columns] names."""
    contexts = np.array([context for context, _ in rows], np.int32)
    queries = np.array([queries for _, queries in rows], np.int32)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    of_row = np.repeat(np.arange(len(rows)), queries)
    positions = np.arange(starts[-1]) - (starts[:-1] - contexts)[of_row]
    writes = page_indices(table, of_row, positions, block_size=block_size)
    return GroupInputs(
        block_table=table,
        query_lens=queries,
        context_lens=contexts,
        num_decodes=num_decodes,
        block_size=block_size,
        window=window,
        device_table=torch.from_numpy(table).to(device),
        query_starts=torch.from_numpy(starts).to(device),
        seq_lens=torch.from_numpy(contexts + queries).to(device),
        write_indices=torch.from_numpy(writes).to(device),
    )


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, call: Shape) -> torch.Tensor:
    """One query [heads, d] at ``position`` over its row's keys and values [n, kv_heads, d], in float32."""
    first = 0 if call.window is None else max(0, position - call.window + 1)
    out = []
    for head in range(call.heads):
        kv_head = head // (call.heads // call.kv_heads)
        scores = keys[first : position + 1, kv_head].float() @ query[head].float() * call.scaling
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        out.append(torch.softmax(scores, 0) @ values[first : position + 1, kv_head].float())
    return torch.stack(out)


def compare(backend: AttentionBackend, rows: Sequence[Row], shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """(The backend's outputs, the loop's in float32), both [T, heads, d] on the CPU.

    Pages that no row ever wrote are NaN where the backend says that it does not read them, zero elsewhere.
    """
    rows = sorted(rows, key=lambda row: row[1] > 1)
    generator = torch.Generator().manual_seed(0)
    size = shape.block_size
    widest = max(-(-(context + queries) // size) for context, queries in rows)
    order = torch.randperm(len(rows) * widest, generator=generator).numpy() + 1
    table = order.reshape(len(rows), widest).astype(np.int32)
    pages = (len(rows) * widest + 1, size, shape.kv_heads, shape.head_dim)
    stored = shape.dtype if shape.cache_dtype is None else shape.cache_dtype
    keys, values = (torch.randn(pages, generator=generator).to(stored) for _ in range(2))
    unwritten = torch.ones(pages[:2], dtype=torch.bool)
    for row, (context, queries) in enumerate(rows):
        for position in range(context + queries):
            unwritten[table[row, position // size], position % size] = False
    filling = 0.0 if backend.reads_whole_blocks else float("nan")
    for tensor in (keys, values):
        tensor.copy_(tensor.float().masked_fill_(unwritten[:, :, None, None], filling))
    query = torch.randn((sum(q for _, q in rows), shape.heads, shape.head_dim), generator=generator).to(shape.dtype)
    inputs = group_inputs(
        table,
        rows,
        num_decodes=sum(queries == 1 for _, queries in rows),
        block_size=size,
        window=shape.window,
        device=shape.device,
    )
    call = LayerCall(
        query=query.to(shape.device),
        keys=keys.to(shape.device),
        values=values.to(shape.device),
        scaling=shape.scaling,
        softcap=shape.softcap,
    )
    out = backend.plan_group(inputs).attend(call)
    assert out.dtype is shape.dtype
    return out.cpu(), _expected(query, keys, values, table, rows=rows, shape=shape)


def _expected(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: Int32Array,
    *,
    rows: Sequence[Row],
    shape: Shape,
) -> torch.Tensor:
    expected, token = [], 0
    for row, (context, queries) in enumerate(rows):
        row_keys, row_values = (pages[torch.from_numpy(table[row])].flatten(0, 1) for pages in (keys, values))
        for offset in range(queries):
            expected.append(naive(query[token], row_keys, row_values, context + offset, shape))
            token += 1
    return torch.stack(expected)
