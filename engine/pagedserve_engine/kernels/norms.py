"""RMS norm with the addition before it, gates, and activations in 8-bit floats: each is one pass over its rows.

What a row is multiplied by next may be its 8-bit form: the norm and the gate give it directly, with the row's scale.
"""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from pagedserve_engine.kernels.floats import narrow

LARGEST = tl.constexpr(448.0)
LARGEST_EXPONENT = tl.constexpr(88.0)
"""Its exponential is the last that float32 holds."""
SMALLEST_SCALE = tl.constexpr(1e-12)
"""Keeps a row of zeros from being divided by zero."""


@triton.jit
def _put_row(values, out, scales, row, WIDTH: tl.constexpr, PADDED: tl.constexpr, QUANTIZED: tl.constexpr):  # noqa: PLR0917
    """Store a row of float32 ``values`` (zeros beyond WIDTH) as ``out`` holds numbers, with its scale if QUANTIZED."""
    at = tl.arange(0, PADDED)
    if QUANTIZED:
        scale = tl.maximum(tl.max(tl.abs(values), 0) / LARGEST, SMALLEST_SCALE)
        tl.store(scales + row, scale)
        values = values / scale
    tl.store(out + row * WIDTH + at, narrow(values, out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def norm_kernel(  # noqa: PLR0917
    x,
    residual,
    weight,
    out,
    scales,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSET: tl.constexpr,
    ADDS: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """One row: residual += x where it ADDS, and the norm of the sum; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    there = at < WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + at, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        added = (tl.load(residual + row * WIDTH + at, mask=there, other=0.0).to(tl.float32) + wide).to(dtype)
        tl.store(residual + row * WIDTH + at, added, mask=there)
        wide = added.to(tl.float32)
    factor = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    normed = rms_norm(wide, factor, tl.sum(wide * wide, 0) / WIDTH, eps, dtype, OFFSET)
    _put_row(normed.to(tl.float32), out, scales, row, WIDTH, PADDED, QUANTIZED)


@triton.jit
def rms_norm(wide, weight, mean_square, eps, dtype: tl.constexpr, OFFSET: tl.constexpr):  # noqa: PLR0917
    """``wide`` normed and weighed, as ``dtype``; rounded before the product as Llama does, with an OFFSET after it."""
    normed = wide * tl.rsqrt(mean_square + eps)
    if OFFSET == 0.0:
        return (normed.to(dtype).to(tl.float32) * weight).to(dtype)
    return (normed * (OFFSET + weight)).to(dtype)


@triton.jit
def quantize_kernel(x, out, scales, x_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):  # noqa: PLR0917
    """One row in 8-bit floats; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    values = tl.load(x + row * x_stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    _put_row(values, out, scales, row, WIDTH, PADDED, True)


@triton.jit
def _gate(gate, up, dtype: tl.constexpr, SILU: tl.constexpr):
    """The activated gate, rounded, times ``up``; float32 that a ``dtype`` holds."""
    wide = gate.to(tl.float32)
    if SILU:
        active = wide / (1.0 + tl.exp(tl.minimum(-wide, LARGEST_EXPONENT)))
    else:
        # Half of 1 + tanh(u) is 1 - 1 / (1 + exp(2u)).
        twice = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        active = wide * (1.0 - 1.0 / (1.0 + tl.exp(tl.minimum(twice, LARGEST_EXPONENT))))
    return (active.to(dtype).to(tl.float32) * up.to(tl.float32)).to(dtype)


@triton.jit
def gate_kernel(gate_up, out, stride, WIDTH: tl.constexpr, SIZE: tl.constexpr, SILU: tl.constexpr):  # noqa: PLR0917
    """A part of one row; grid (rows, parts)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = at < WIDTH
    gate = tl.load(gate_up + row * stride + at, mask=there, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + at, mask=there, other=0.0)
    tl.store(out + row * WIDTH + at, _gate(gate, up, out.dtype.element_ty, SILU), mask=there)


@triton.jit
def gate_quantize_kernel(  # noqa: PLR0917
    gate_up, out, scales, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr
):
    """One whole row in 8-bit floats; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    gate = tl.load(gate_up + row * stride + at, mask=at < WIDTH, other=0.0)
    up = tl.load(gate_up + row * stride + WIDTH + at, mask=at < WIDTH, other=0.0)
    values = _gate(gate, up, gate_up.dtype.element_ty, SILU).to(tl.float32)
    _put_row(values, out, scales, row, WIDTH, PADDED, True)
