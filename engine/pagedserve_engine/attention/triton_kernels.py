"""The paged attention kernels: one inner loop, a kernel for rows of one query, one for chunks, and a reduction.

Decoding rows and prefill chunks are two launches rather than one kernel. A decoding row is bound by the cache's bytes
and wants small tiles, its keys split over many programs; a chunk is bound by the tensor cores and wants 128 query
rows, which on Hopper is what it takes to use their wide products at all. One kernel would be compiled for both, with
the chunk's registers and shared memory, and run half as many decode programs at once.

A program holds the query heads that share one key head side by side (rows of a tile: query · group + head), so that
each key and value is read once for all of them. Lengths are read from device memory alone. Only keys that some query
sees are loaded, others stand as zeros: a page that was never written may hold anything, NaN included.

Scores are kept times log2(e), so that the softmax takes powers of two.
"""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from pagedserve_engine.kernels.floats import widen

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(products, scale, softcap, CAPPED: tl.constexpr):
    """Scores times log2(e)."""
    if CAPPED:
        # tanh by one exponential, which may not overflow.
        power = tl.minimum(products * (2.0 * LOG2E * scale / softcap), 126.0)
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(power))
        return tanh * (softcap * LOG2E)
    return products * (scale * LOG2E)


@triton.jit
def attend(  # noqa: PLR0917
    query,
    peak,
    total,
    acc,
    start,
    stop,
    first,
    positions,
    keys,
    values,
    table,
    kv_head,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """Go over the keys from ``start`` (a multiple of N) to ``stop``; those before ``first`` are not read.

    Unmasked, every key is seen by every query. Returns the running peak [M], total [M] and weighted values [M, D].
    """
    lanes, dims = tl.arange(0, N), tl.arange(0, D)
    at = start + lanes
    # Block ids come a step ahead, outside the pipeline: loaded where they are used, they would take half its stages.
    block = tl.load(table + at // BLOCK_SIZE, mask=(at >= first) & (at < stop), other=0)
    for begin in tl.range(start, stop, N):
        at = begin + lanes
        loaded = (at >= first) & (at < stop)
        page = (block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE) * KV_HEADS + kv_head
        block = tl.load(table + (at + N) // BLOCK_SIZE, mask=at + N < stop, other=0)
        place = page * HEAD_DIM
        if MASKED or HEAD_DIM != D:
            real = dims < HEAD_DIM
            seen = loaded | (not MASKED)
            key = tl.load(keys + (place[None, :] + dims[:, None]), mask=seen[None, :] & real[:, None], other=0.0)
        else:
            key = tl.load(keys + (place[None, :] + dims[:, None]))
        if FLOAT32_DOT:
            products = tl.dot(query, widen(key, tl.float32), input_precision="ieee")
        else:
            products = tl.dot(query, widen(key, query.dtype))
        scores = _scaled(products, scale, softcap, CAPPED)
        if MASKED:
            visible = (at[None, :] <= positions[:, None]) & loaded[None, :]
            if WINDOWED:
                visible = visible & (at[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A query that has seen nothing yet has no peak: 0 keeps its weights at exp2(-inf) = 0.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        if MASKED or HEAD_DIM != D:
            value = tl.load(values + (place[:, None] + dims[None, :]), mask=seen[:, None] & real[None, :], other=0.0)
        else:
            value = tl.load(values + (place[:, None] + dims[None, :]))
        if FLOAT32_DOT:
            acc = tl.dot(weights, widen(value, tl.float32), acc * shrink[:, None], input_precision="ieee")
        else:
            acc = tl.dot(weights.to(query.dtype), widen(value, query.dtype), acc * shrink[:, None])
        peak = new_peak
    return peak, total, acc


@triton.jit(do_not_specialize=["table", "seq_lens", "table_stride", "window", "splits"])
def decode_kernel(  # noqa: PLR0917
    query,
    keys,
    values,
    table,
    seq_lens,
    out,
    partial,
    log_totals,
    scale,
    softcap,
    window,
    splits,
    query_stride,
    head_stride,
    table_stride,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """One row of one query, one key head, one share of its keys; grid (kv_heads, rows, splits)."""
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    start, stop = split_range(seq_len, window, splits, split, N, WINDOWED)
    if SPLIT:  # noqa: SIM102 - known when compiled, unlike the other
        if start >= stop:
            return
    first = tl.maximum(seq_len - window, 0) if WINDOWED else 0
    heads, dims = tl.arange(0, M), tl.arange(0, D)
    real = (heads[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    offsets = (kv_head * GROUP + heads[:, None]) * head_stride + dims[None, :]
    rows = tl.load(query + row * query_stride + offsets, mask=real, other=0.0)
    if FLOAT32_DOT:
        rows = rows.to(tl.float32)
    positions = tl.full([M], 0, tl.int32) + (seq_len - 1)
    peak, total, acc = attend(
        rows,
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M], tl.float32),
        tl.zeros([M, D], tl.float32),
        start,
        stop,
        first,
        positions,
        keys,
        values,
        table + row * table_stride,
        kv_head,
        scale,
        softcap,
        window,
        KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        D,
        N,
        True,
        False,  # the first key of the range is the window's: nothing else to hide
        CAPPED,
        FLOAT32_DOT,
    )
    # A padded row has no keys: zeros.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    head = row * (KV_HEADS * GROUP) + kv_head * GROUP + heads
    if SPLIT:
        share = head * splits + split
        tl.store(partial + share[:, None] * HEAD_DIM + dims[None, :], acc, mask=real)
        tl.store(log_totals + share, peak + tl.log2(total), mask=heads < GROUP)
    else:
        tl.store(out + head[:, None] * HEAD_DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def split_range(seq_len, window, splits, split, N: tl.constexpr, WINDOWED: tl.constexpr):  # noqa: PLR0917
    """Keys [start, stop) of a row's ``split``: whole tiles, as many for each; the last ones may have none."""
    first_tile = tl.maximum(seq_len - window, 0) // N if WINDOWED else 0
    share = tl.cdiv(tl.cdiv(seq_len, N) - first_tile, splits)
    start = (first_tile + split * share) * N
    return start, tl.minimum(start + share * N, seq_len)


@triton.jit(do_not_specialize=["seq_lens", "window", "splits"])
def reduce_kernel(  # noqa: PLR0917
    partial,
    log_totals,
    seq_lens,
    out,
    window,
    splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Put the shares of one row and query head together; grid (rows, heads). Shares without keys are not read."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    dims = tl.arange(0, D)
    of_row = row * HEADS + head
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([D], tl.float32)
    for begin in tl.range(0, splits, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        start, stop = split_range(seq_len, window, splits, split, N, WINDOWED)
        there = (split < splits) & (start < stop)
        share = of_row * splits + split
        log_total = tl.load(log_totals + share, mask=there, other=float("-inf"))
        mask = there[:, None] & (dims[None, :] < HEAD_DIM)
        values = tl.load(partial + share[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(log_total, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(log_total - base)
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        peak = new_peak
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + of_row * HEAD_DIM + dims, acc.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
