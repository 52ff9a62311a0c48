"""Sampling without a sort: the token that ``sampling.py`` would choose, from a few looks at the vocabulary.

Two launches. The first reads the logits once and leaves the peak and the sum of weights of every 128 tokens. The
second, one program to a row, works from these: a greedy row, and a random one that nothing is cut from, look at one
more block of 128 and are done. A row with filters searches for the least weight they keep. The peaks bound it from
below (the k-th largest peak is at most the k-th largest weight), so that only blocks that reach the bound are looked at
again: as many as k, or as it takes to gather the mass of top_p. Each look halves the range of bits and snaps it to
weights that are there, so that it ends after some 10 looks where the logits had 16 bits, and 30 at most.

Bytes for 128 rows of 128,256 logits in bfloat16: 33 MB at first, 11 µs at 3 TB/s; a look at every block again is as
much, most of it from the second-level cache.
"""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128
"""Tokens whose weights are summed together."""

_SUMMARY_BLOCKS = 16

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_SUMMARISED: tl.constexpr = tl.constexpr(_SUMMARY_BLOCKS)
_AT_ONCE: tl.constexpr = tl.constexpr(64)
"""Blocks of a step of a look: as many as keep enough bytes on their way for one program to a multiprocessor."""
_LEAST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""Keeps a row in which nothing is allowed from becoming NaN; it weighs nothing, and token 0 is drawn."""


@triton.jit
def summary_kernel(  # noqa: PLR0917
    logits, inverse_temperature, peaks, sums, stride, VOCAB: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr
):
    """Peak of each block's logits, and the sum of its weights if that peak weighed 1; grid (rows, block groups)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * _SUMMARISED + tl.arange(0, _SUMMARISED)
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    scores = tl.load(logits + row * stride + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    peak = tl.max(scores, 1)
    base = tl.maximum(peak, _LEAST)
    weights = tl.exp((scores - base[:, None]) * tl.load(inverse_temperature + row))
    tl.store(peaks + row * PADDED + block, peak, mask=block < BLOCKS)
    tl.store(sums + row * PADDED + block, tl.sum(weights, 1), mask=block < BLOCKS)


@triton.jit
def _list_blocks(weights, floor, blocks, PADDED: tl.constexpr):
    """Write to ``blocks`` the blocks whose peak's weight reaches ``floor``, in order; their number."""
    reaches = (weights >= floor).to(tl.int32)
    tl.debug_barrier()  # an earlier list may still be read
    tl.store(blocks + tl.cumsum(reaches, 0) - 1, tl.arange(0, PADDED), mask=reaches == 1)
    tl.debug_barrier()
    return tl.sum(reaches, 0)


@triton.jit
def _weigh(logits, block, there, peak, scale, VOCAB: tl.constexpr):  # noqa: PLR0917
    """Weights [B, 128] of the blocks ``block`` [B], and which of them are tokens."""
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    real = there[:, None] & (at < VOCAB)
    scores = tl.load(logits + at, mask=real, other=float("-inf")).to(tl.float32)
    return tl.exp((scores - peak) * scale), real


@triton.jit
def _look(logits, blocks, count, peak, scale, border, BY_MASS: tl.constexpr, VOCAB: tl.constexpr):  # noqa: PLR0917
    """Of the weights from ``border`` on in the listed blocks: sum or number, and least; and the largest below it."""
    amounts = tl.zeros([_AT_ONCE, _BLOCK], tl.float32 if BY_MASS else tl.int32)
    least = tl.full([_AT_ONCE, _BLOCK], 2.0, tl.float32)
    below = tl.full([_AT_ONCE, _BLOCK], 0.0, tl.float32)
    for begin in tl.range(0, count, _AT_ONCE):
        slot = begin + tl.arange(0, _AT_ONCE)
        block = tl.load(blocks + slot, mask=slot < count, other=0)
        weights, real = _weigh(logits, block, slot < count, peak, scale, VOCAB)
        kept = real & (weights >= border)
        amounts += tl.where(kept, weights, 0.0) if BY_MASS else kept.to(tl.int32)
        least = tl.minimum(least, tl.where(kept, weights, 2.0))
        below = tl.maximum(below, tl.where(kept, 0.0, weights))
    amount = tl.sum(tl.sum(amounts, 1).to(tl.float64 if BY_MASS else tl.int64), 0)
    return amount, tl.min(tl.min(least, 1), 0), tl.max(tl.max(below, 1), 0)


@triton.jit
def _search(logits, blocks, count, peak, scale, low, target, BY_MASS: tl.constexpr, VOCAB: tl.constexpr):  # noqa: PLR0917
    """The largest weight from which on there is a mass, or a number, of ``target``; ``low`` is known to reach it.

    Floats of one sign are ordered as their bits are; the largest weight is 1.
    """
    low_bits = low.to(tl.int32, bitcast=True)
    high_bits = tl.full([], 1.0, tl.float32).to(tl.int32, bitcast=True)
    while low_bits < high_bits:
        middle = low_bits + (high_bits - low_bits + 1) // 2
        border = middle.to(tl.float32, bitcast=True)
        amount, least, below = _look(logits, blocks, count, peak, scale, border, BY_MASS, VOCAB)
        reached = amount >= target
        low_bits = tl.where(reached, least.to(tl.int32, bitcast=True), low_bits)
        high_bits = tl.where(reached, high_bits, below.to(tl.int32, bitcast=True))
    return low_bits.to(tl.float32, bitcast=True)


@triton.jit
def _bound(weights, target, BY_MASS: tl.constexpr):
    """The largest of ``weights`` from which on they alone have the mass, or number, ``target``; 0 if they have not."""
    bits = tl.zeros([], tl.int32)
    for place in tl.range(0, 30):
        tried = bits | (1 << (29 - place))
        kept = weights >= tried.to(tl.float32, bitcast=True)
        if BY_MASS:
            reached = tl.sum(tl.where(kept, weights, 0.0).to(tl.float64), 0) >= target
        else:
            reached = tl.sum(kept.to(tl.int32), 0) >= target
        bits = tl.where(reached, tried, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _first_above(ends, place, total):
    """Index of the first of ``ends`` above ``place``; if rounding leaves none, of the last rise."""
    return tl.minimum(tl.sum((ends <= place).to(tl.int32), 0), tl.sum((ends < total).to(tl.int32), 0))


@triton.jit
def _floor(logits, blocks, weights, sums, peak, scale, top_k, top_p, min_p, VOCAB: tl.constexpr, PADDED: tl.constexpr):  # noqa: PLR0917
    """The least weight that min_p, then top_k, then top_p of the rest keep."""
    floor = min_p
    if top_k < VOCAB:
        low = _bound(weights, top_k, False)
        count = _list_blocks(weights, low, blocks, PADDED)
        floor = tl.maximum(floor, _search(logits, blocks, count, peak, scale, low, top_k, False, VOCAB))
    if top_p < 1.0:
        mass = tl.sum((sums * weights).to(tl.float64), 0)
        if floor > 0.0:
            count = _list_blocks(weights, floor, blocks, PADDED)
            mass, _, _ = _look(logits, blocks, count, peak, scale, floor, True, VOCAB)
        # Above zero, so that top_p = 0 still keeps the likeliest token.
        place = tl.maximum(mass * top_p, 1e-30)
        low = tl.maximum(floor, _bound(weights, place, True))
        count = _list_blocks(weights, low, blocks, PADDED)
        floor = tl.maximum(floor, _search(logits, blocks, count, peak, scale, low, place, True, VOCAB))
    return floor


@triton.jit
def choice_kernel(  # noqa: PLR0917
    logits,
    inverse_temperature,
    top_k,
    top_p,
    min_p,
    greedy,
    uniform,
    peaks,
    sums,
    blocks,
    token_ids,
    stride,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The token of one row; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    logits, blocks, sums = logits + row * stride, blocks + row * PADDED, sums + row * PADDED
    block, lanes = tl.arange(0, PADDED), tl.arange(0, _BLOCK)
    tops = tl.load(peaks + row * PADDED + block, mask=block < BLOCKS, other=float("-inf"))
    peak = tl.maximum(tl.max(tops, 0), _LEAST)
    if tl.load(greedy + row) != 0:
        best = tl.minimum(tl.min(tl.where(tops == peak, block, PADDED), 0), BLOCKS - 1)
        at = best * _BLOCK + lanes
        scores = tl.load(logits + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        token = tl.min(tl.where(scores == peak, at, VOCAB), 0)
        tl.store(token_ids + row, tl.where(token < VOCAB, token, 0).to(tl.int64))
        return
    scale = tl.load(inverse_temperature + row)
    weights = tl.where(block < BLOCKS, tl.exp((tops - peak) * scale), -1.0)  # no block: below every floor
    block_sums = tl.load(sums + block, mask=block < BLOCKS, other=0.0)
    k, p, least = tl.load(top_k + row), tl.load(top_p + row).to(tl.float64), tl.load(min_p + row)
    floor = _floor(logits, blocks, weights, block_sums, peak, scale, k, p, least, VOCAB, PADDED)
    kept = tl.where(block < BLOCKS, block_sums * weights, 0.0)
    if floor > 0.0:
        count = _list_blocks(weights, floor, blocks, PADDED)
        for begin in tl.range(0, count, _AT_ONCE):
            slot = begin + tl.arange(0, _AT_ONCE)
            listed = tl.load(blocks + slot, mask=slot < count, other=0)
            cut, _ = _weigh(logits, listed, slot < count, peak, scale, VOCAB)
            tl.store(sums + listed, tl.sum(tl.where(cut >= floor, cut, 0.0), 1), mask=slot < count)
        tl.debug_barrier()
        kept = tl.load(sums + block, mask=weights >= floor, other=0.0)
    ends = tl.cumsum(kept.to(tl.float64), 0)
    total = tl.max(ends, 0)
    place = tl.load(uniform + row).to(tl.float64) * total
    chosen = _first_above(ends, place, total)
    before = tl.sum(tl.where(block == chosen - 1, ends, 0.0), 0)
    at = chosen * _BLOCK + lanes
    scores = tl.load(logits + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    inside = tl.exp((scores - peak) * scale)
    inner = tl.cumsum(tl.where(inside >= floor, inside, 0.0).to(tl.float64), 0)
    token = chosen * _BLOCK + _first_above(inner, place - before, tl.max(inner, 0))
    tl.store(token_ids + row, token.to(tl.int64))


def sample(
    logits: torch.Tensor,
    *,
    inverse_temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    greedy: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """The next token [B] int64 of each row of ``logits`` [B, V], which are left as they are.

    By row [B]: ``inverse_temperature`` and ``min_p`` (0 is off) float32, ``top_k`` from 1 to V (off), ``top_p`` (1 is
    off) and ``uniform`` in [0, 1) float32 or float64, ``greedy`` bool. Nothing is decided on the host: it may be
    captured.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    padded = 1 << (blocks - 1).bit_length()
    peaks, sums = torch.empty(2, rows, padded, dtype=torch.float32, device=logits.device)
    lists = torch.empty(rows, padded, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    shape = {"VOCAB": vocab, "BLOCKS": blocks, "PADDED": padded}
    grid = (rows, -(-blocks // _SUMMARY_BLOCKS))
    summary_kernel[grid](logits, inverse_temperature, peaks, sums, logits.stride(0), **shape, enable_fp_fusion=True)
    choice_kernel[(rows,)](
        logits,
        inverse_temperature,
        top_k,
        top_p,
        min_p,
        greedy,
        uniform,
        peaks,
        sums,
        lists,
        token_ids,
        logits.stride(0),
        **shape,
        num_warps=16,
        enable_fp_fusion=True,
    )
    return token_ids
