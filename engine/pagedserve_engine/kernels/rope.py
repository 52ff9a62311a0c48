"""From one fused product to rotated queries and a written cache: split, norm per head, rotate and store in one pass."""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from pagedserve_engine.kernels.floats import narrow
from pagedserve_engine.kernels.norms import rms_norm


@triton.jit
def _weigh(x, norm, dims, real, mean_square, eps, OFFSET: tl.constexpr):  # noqa: PLR0917
    """The heads ``x`` [heads, d] normed, with the weights of ``norm`` at ``dims``."""
    weight = tl.load(norm + dims, mask=real, other=0.0).to(tl.float32)
    return rms_norm(x.to(tl.float32), weight[None, :], mean_square[:, None], eps, x.dtype, OFFSET)


@triton.jit
def rope_kernel(  # noqa: PLR0917
    qkv,
    q_norm,
    k_norm,
    cos_sin,
    positions,
    write_indices,
    query,
    keys,
    values,
    stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMED: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
):
    """SIZE of the heads of one token, queries, keys and values in a row; grid (tokens, parts).

    A number is read with its pair's other half, so that the rotation needs nothing of another lane.
    """
    token = tl.program_id(0).to(tl.int64)
    head, dims = tl.program_id(1) * SIZE + tl.arange(0, SIZE), tl.arange(0, D)
    real = dims < HEAD_DIM
    there = (head < HEADS + 2 * KV_HEADS)[:, None] & real[None, :]
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    half: tl.constexpr = ROTARY_DIM // 2
    turned = dims < ROTARY_DIM
    other = tl.where(dims < half, dims + half, tl.where(turned, dims - half, dims))
    base = qkv + token * stride + head[:, None] * HEAD_DIM
    x = tl.load(base + dims[None, :], mask=there, other=0.0)
    pair = tl.load(base + other[None, :], mask=there, other=0.0)
    wide, wide_pair = x.to(tl.float32), pair.to(tl.float32)
    if NORMED:
        mean_square = tl.sum(wide * wide, 1) / HEAD_DIM
        # Weights of queries and keys are both at hand; a value keeps what it is.
        of_query = _weigh(x, q_norm, dims, real, mean_square, eps, OFFSET).to(tl.float32)
        of_key = _weigh(x, k_norm, dims, real, mean_square, eps, OFFSET).to(tl.float32)
        wide = tl.where(is_query[:, None], of_query, tl.where(is_key[:, None], of_key, wide))
        of_query = _weigh(pair, q_norm, other, real, mean_square, eps, OFFSET).to(tl.float32)
        of_key = _weigh(pair, k_norm, other, real, mean_square, eps, OFFSET).to(tl.float32)
        wide_pair = tl.where(is_query[:, None], of_query, tl.where(is_key[:, None], of_key, wide_pair))
    turn = tl.load(positions + token) * ROTARY_DIM
    column = tl.where(dims < half, dims, dims - half)
    cos = tl.load(cos_sin + turn + column, mask=turned, other=1.0)
    sin = tl.load(cos_sin + turn + column + half, mask=turned, other=0.0)
    sin = tl.where(dims < half, -sin, sin)
    rotated = wide * cos[None, :] + wide_pair * sin[None, :]
    query_place = query + token * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
    tl.store(query_place, rotated.to(query.dtype.element_ty), mask=is_query[:, None] & real[None, :])
    page = tl.load(write_indices + token)
    written = there & ((page + tl.zeros_like(dims)) >= 0)[None, :]
    cache = page * (KV_HEADS * HEAD_DIM) + dims[None, :]
    key_place = cache + (head - HEADS)[:, None] * HEAD_DIM
    # Through the activations' dtype, as without this kernel.
    rounded = rotated.to(x.dtype).to(tl.float32)
    tl.store(keys + key_place, narrow(rounded, keys.dtype.element_ty), mask=written & is_key[:, None])
    value_place = cache + (head - HEADS - KV_HEADS)[:, None] * HEAD_DIM
    is_value = head >= HEADS + KV_HEADS
    tl.store(values + value_place, narrow(x.to(tl.float32), values.dtype.element_ty), mask=written & is_value[:, None])
