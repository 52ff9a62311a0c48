"""Products with int8 weights for the few rows of a decoding step, which are bound by the weights' bytes.

Weights are widened on their way to the tensor cores, exactly; nothing wider is ever stored. Where the weight's rows
make too few programs to fill the card, each takes a share of the columns, and a second launch adds the shares up.
"""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_ROWS = 64
"""Rows up to which ``int8_linear`` is made for; for more, widen the weight once and multiply with cuBLAS."""

_OUTPUTS = 64
"""Weight rows of a program."""

_COLUMNS = 128

_PROGRAMS_PER_PROCESSOR = 2


@triton.jit(do_not_specialize=["rows", "share"])
def int8_kernel(  # noqa: PLR0917
    x,
    weight,
    scale,
    out,
    rows,
    share,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """OUTPUTS columns of the product over ``share`` of its sums; grid (output groups, shares).

    Split, the sums go to out [shares, rows, N] float32 as they are.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row, lanes = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start = tl.program_id(1) * share
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    weight_rows = weight + output.to(tl.int64)[None, :] * K
    for begin in tl.range(start, tl.minimum(start + share, K), COLUMNS):
        column = begin + lanes
        there = column < K
        part = tl.load(
            x + row[:, None] * x_stride + column[None, :], mask=(row < rows)[:, None] & there[None, :], other=0.0
        )
        small = tl.load(weight_rows + column[:, None], mask=(output < N)[None, :] & there[:, None], other=0)
        if FLOAT32_DOT:
            acc = tl.dot(part.to(tl.float32), small.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(part, small.to(part.dtype), acc)
    mask = (row < rows)[:, None] & (output < N)[None, :]
    if SPLIT:
        place = (tl.program_id(1) * rows + row)[:, None] * N + output[None, :]
        tl.store(out + place, acc, mask=mask)
    else:
        acc = acc * tl.load(scale + output, mask=output < N, other=0.0)[None, :]
        tl.store(out + row[:, None] * N + output[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "shares"])
def add_shares_kernel(partial, scale, out, rows, shares, N: tl.constexpr, SIZE: tl.constexpr):  # noqa: PLR0917
    """A part of one row of the product; grid (rows, parts)."""
    row, output = tl.program_id(0), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = output < N
    total = tl.zeros([SIZE], tl.float32)
    for share in tl.range(0, shares):
        total += tl.load(partial + (share * rows + row) * N + output, mask=there, other=0.0)
    total = total * tl.load(scale + output, mask=there, other=0.0)
    tl.store(out + row * N + output, total.to(out.dtype.element_ty), mask=there)


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, processors: int) -> torch.Tensor:
    """``x`` [T, K] times ``weight`` [N, K] int8 transposed times ``scale`` [N] float32, in the dtype of ``x``.

    T is at most ``MAX_ROWS``; ``processors`` are the card's multiprocessors.
    """
    rows, width = x.shape
    outputs = len(weight)
    groups = -(-outputs // _OUTPUTS)
    shares = min(max(_PROGRAMS_PER_PROCESSOR * processors // groups, 1), max(width // (4 * _COLUMNS), 1))
    share = -(-width // (shares * _COLUMNS)) * _COLUMNS
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    partial = torch.empty(shares, rows, outputs, dtype=torch.float32, device=x.device) if shares > 1 else out
    int8_kernel[groups, shares](
        x,
        weight,
        scale,
        partial,
        rows,
        share,
        x.stride(0),
        N=outputs,
        K=width,
        ROWS=max(16, 1 << (rows - 1).bit_length()),
        OUTPUTS=_OUTPUTS,
        COLUMNS=_COLUMNS,
        SPLIT=shares > 1,
        FLOAT32_DOT=x.device.type == "cpu" or x.dtype is torch.float32,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=True,
    )
    if shares > 1:
        size = min(1024, 1 << (outputs - 1).bit_length())
        grid = (rows, -(-outputs // size))
        add_shares_kernel[grid](partial, scale, out, rows, shares, N=outputs, SIZE=size, enable_fp_fusion=True)
    return out
