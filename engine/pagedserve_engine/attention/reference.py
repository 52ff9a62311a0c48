"""Attention in plain torch: the oracle on every device, and the backend on a CPU.

A step is cut into segments: decoding rows of similar length side by side, and each prefill chunk in slices of
queries. A segment gathers the blocks that it reads, folds the query heads that share a key head into the query axis,
so that keys and values are never repeated, and attends under one mask. Segments are planned once for a step and
a layer group and serve all of the group's layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pagedserve_engine.attention.interface import GroupInputs, LayerCall
from pagedserve_engine.float8 import FLOAT8, as_bytes, widen

QUERY_SLICE = 256
"""Queries of a prefill slice: bounds the mask, and spares the keys that lie wholly in its future."""

SEGMENT_COST = 512
"""Keys whose gathering costs about as much as one more segment (per layer, measured on a CPU)."""

SEGMENT_KEYS = 16384
"""Keys that a segment of several rows gathers at most: bounds the copy, and keeps it near the cache of a CPU."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Queries of one row: ``queries`` of them, the first at ``position``, found from ``token`` on in the batch."""

    row: int
    token: int
    queries: int
    position: int


@dataclass(frozen=True, slots=True)
class Segment:
    """B row slices of equally many queries q that attend together over at most L keys."""

    tokens: torch.Tensor
    """[B · q] where the queries stand in the batch."""
    blocks: torch.Tensor
    """[B · L / block_size] block ids to gather."""
    mask: torch.Tensor
    """[B, 1, q, L] True where a query sees a key."""
    num_slices: int


@dataclass(frozen=True, slots=True)
class ReferenceGroupStep:
    """A layer group's part of a step for this backend; see ``GroupStep``."""

    write_indices: torch.Tensor
    segments: tuple[Segment, ...]

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Outputs [T, heads, head_dim] in the query's dtype."""
        out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
        for segment in self.segments:
            out.index_copy_(0, segment.tokens, _attend(call, segment))
        return out


class ReferenceBackend:
    """Attention in plain torch on any device."""

    name = "reference"
    plans_on_device = False
    reads_whole_blocks = True

    def plan_group(self, inputs: GroupInputs) -> ReferenceGroupStep:
        """Cut the step into segments, on the host."""
        starts = np.zeros(len(inputs.query_lens) + 1, np.int64)
        np.cumsum(inputs.query_lens, out=starts[1:])
        segments = tuple(_build_segment(inputs, slices) for slices in _group_slices(inputs, starts))
        return ReferenceGroupStep(inputs.write_indices, segments)


def _group_slices(inputs: GroupInputs, starts: npt.NDArray[np.int64]) -> Iterator[list[RowSlice]]:
    """Slices that attend together: decoding rows by similar length, then each prefill slice on its own."""
    query_lens, context_lens = inputs.query_lens, inputs.context_lens
    lengths = context_lens[: inputs.num_decodes] + 1
    reads = lengths if inputs.window is None else np.minimum(lengths, inputs.window)
    bucket: list[RowSlice] = []
    longest = 0
    # Longest first: a bucket's width is its first row's, and it closes where padding would cost more than a segment.
    for row in np.argsort(-reads, kind="stable").tolist():
        padding = longest - int(reads[row])
        if bucket and (padding * len(bucket) > SEGMENT_COST or longest * (len(bucket) + 1) > SEGMENT_KEYS):
            yield bucket
            bucket = []
        if not bucket:
            longest = int(reads[row])
        bucket.append(RowSlice(row, int(starts[row]), 1, int(context_lens[row])))
    if bucket:
        yield bucket
    for row in range(inputs.num_decodes, len(query_lens)):
        for offset in range(0, int(query_lens[row]), QUERY_SLICE):
            queries = min(QUERY_SLICE, int(query_lens[row]) - offset)
            yield [RowSlice(row, int(starts[row]) + offset, queries, int(context_lens[row]) + offset)]


def _build_segment(inputs: GroupInputs, slices: list[RowSlice]) -> Segment:
    block_table, block_size, window = inputs.block_table, inputs.block_size, inputs.window
    device = inputs.device
    queries = slices[0].queries
    rows = np.array([s.row for s in slices])
    first = np.array([s.position for s in slices])
    start = np.zeros_like(first) if window is None else np.maximum(first - window + 1, 0)
    start_block = start // block_size
    stop_block = -((first + queries) // -block_size)
    width = int((stop_block - start_block).max())
    columns = np.minimum(start_block[:, None] + np.arange(width), block_table.shape[1] - 1)
    blocks = block_table[rows[:, None], columns].astype(np.int64)
    # Rows that end before the widest one read whatever stands there: their mask hides it.
    keys = (start_block * block_size)[:, None, None] + np.arange(width * block_size)
    at = first[:, None, None] + np.arange(queries)[:, None]
    mask = keys <= at if window is None else (keys <= at) & (keys > at - window)
    tokens = np.array([s.token for s in slices])[:, None] + np.arange(queries)
    return Segment(
        tokens=_to_device(tokens.reshape(-1), device),
        blocks=_to_device(blocks.reshape(-1), device),
        mask=_to_device(mask[:, None], device),
        num_slices=len(slices),
    )


def _attend(call: LayerCall, segment: Segment) -> torch.Tensor:
    """Outputs [B · q, heads, head_dim] of one segment."""
    heads, head_dim = call.query.shape[1:]
    kv_heads = call.keys.shape[2]
    group, batch = heads // kv_heads, segment.num_slices
    dtype = torch.float32 if call.query.device.type == "cpu" else call.query.dtype
    query = call.query.index_select(0, segment.tokens).to(dtype)
    queries = len(query) // batch
    # [B, q, kv_heads, group, d] -> [B, kv_heads, group · q, d]
    folded = query.view(batch, queries, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, group * queries, head_dim)
    keys = _gather(call.keys, segment.blocks, batch, dtype)
    values = _gather(call.values, segment.blocks, batch, dtype)
    mask = segment.mask.repeat(1, 1, group, 1) if queries > 1 else segment.mask
    attended = _scores_to_values(folded, keys, values, mask=mask, call=call)
    unfolded = attended.view(batch, kv_heads, group, queries, head_dim).permute(0, 3, 1, 2, 4)
    return unfolded.reshape(batch * queries, heads, head_dim).to(call.query.dtype)


def _gather(pages: torch.Tensor, blocks: torch.Tensor, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, kv_heads, L, head_dim] of the ``blocks`` [B · L / block_size], in ``dtype``."""
    gathered = as_bytes(pages).view(len(pages), -1).index_select(0, blocks).view(pages.dtype)
    wide = widen(gathered, dtype) if pages.dtype is FLOAT8 else gathered.to(dtype)
    return wide.view(batch, -1, *pages.shape[2:]).transpose(1, 2)


def _scores_to_values(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    if call.softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=call.scaling)
    scores = torch.matmul(query, keys.transpose(2, 3)) * call.scaling
    scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype), values)


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
