"""The paged attention kernel for rows of several queries; ``triton_kernels.py`` says how the kernels are cut."""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from pagedserve_engine.attention.triton_kernels import attend

_ROWS_AT_ONCE = tl.constexpr(256)


@triton.jit
def _find_row(query_starts, rows, program, QUERIES: tl.constexpr):
    """The row of a program, and which of the row's programs it is.

    Row r owns the programs from (its first query, counted from the first row's) // QUERIES + r on: never fewer than
    it needs.
    """
    origin = tl.load(query_starts)
    owners = 0
    for begin in tl.range(0, rows, _ROWS_AT_ONCE):
        row = begin + tl.arange(0, _ROWS_AT_ONCE)
        start = tl.load(query_starts + row, mask=row < rows, other=0) - origin
        owners += tl.sum(((start // QUERIES + row <= program) & (row < rows)).to(tl.int32), 0)
    row = owners - 1
    return row, program - (tl.load(query_starts + row) - origin) // QUERIES - row


@triton.jit(do_not_specialize=["table", "query_starts", "seq_lens", "window", "rows", "table_stride"])
def prefill_kernel(  # noqa: PLR0917
    query,
    keys,
    values,
    table,
    query_starts,
    seq_lens,
    out,
    scale,
    softcap,
    window,
    rows,
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
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """M // GROUP queries of one row, one key head; grid (query tiles, kv_heads)."""
    QUERIES: tl.constexpr = M // GROUP
    # The last tiles see the most keys: they start first, so that none of them is left alone at the end.
    row, tile = _find_row(query_starts, rows, tl.num_programs(0) - 1 - tl.program_id(0), QUERIES)
    kv_head = tl.program_id(1)
    row_start = tl.load(query_starts + row)
    queries = tl.load(query_starts + row + 1) - row_start
    if tile * QUERIES >= queries:
        return
    seq_len = tl.load(seq_lens + row)
    lanes, dims = tl.arange(0, M), tl.arange(0, D)
    place = tile * QUERIES + lanes // GROUP
    asked = (lanes < QUERIES * GROUP) & (place < queries)
    head = kv_head * GROUP + lanes % GROUP
    token = (row_start + place).to(tl.int64)
    mask = asked[:, None] & (dims[None, :] < HEAD_DIM)
    offsets = token * query_stride + head * head_stride
    vectors = tl.load(query + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    if FLOAT32_DOT:
        vectors = vectors.to(tl.float32)
    positions = seq_len - queries + place
    least = seq_len - queries + tile * QUERIES
    first = tl.maximum(least - window + 1, 0) if WINDOWED else 0
    start = first // N * N
    stop = tl.minimum(least + QUERIES, seq_len)
    # Up to here every key is seen by every query; a window has such tiles too, but few.
    unmasked = start if WINDOWED else (least + 1) // N * N
    peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for masked in tl.static_range(0, 2):
        if masked or not WINDOWED:
            peak, total, acc = attend(
                vectors,
                peak,
                total,
                acc,
                unmasked if masked else start,
                stop if masked else unmasked,
                first,
                positions,
                keys,
                values,
                table + row.to(tl.int64) * table_stride,
                kv_head,
                scale,
                softcap,
                window,
                KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                D,
                N,
                masked == 1,
                WINDOWED,
                CAPPED,
                FLOAT32_DOT,
            )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place_out = (token * (KV_HEADS * GROUP) + head) * HEAD_DIM
    tl.store(out + place_out[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)
