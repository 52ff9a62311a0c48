"""Products of activations with 8-bit weights, by device: each takes what a quantised layer holds and gives its output.

All compute ``x @ (weight * scale).T + bias`` with sums in float32, rounded to the dtype of ``x`` (some products before
the bias is added); they differ in what they multiply: 8-bit floats on both sides, or activations as they are and
weights widened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from pagedserve_engine.float8 import LARGEST, narrow, widen

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x [T, K], weight [N, K] in 8 bits, scale [N] float32, bias [N] or None) to [T, N] in the dtype of ``x``."""
RowsProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""The same of rows [T, K] that are 8-bit floats already, with the scale [T, 1] float32 of each behind them."""

SMALLEST_SCALE: Final = 1e-12
"""Keeps a row of zeros from being divided by zero."""
_FEW_ROWS: Final = 16
"""Rows up to which torch's packed int8 product beats a widened one (measured on AVX2: 94 against 324 µs at 4 rows)."""

_PACKED: Final = 32
"""The packed product reads past the end of weights whose sides aren't multiples of its vectors."""


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [T, K] in 8-bit floats, and the scale [T, 1] float32 of each row; a NaN makes its whole row NaN."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    return narrow(wide / scale), scale


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Both sides in 8-bit floats, on a GPU that multiplies them; it gives bfloat16 only, others are widened."""
    if x.dtype is not torch.bfloat16:
        return widened_product(x, weight, scale, bias)
    return multiply_rows(*quantize_rows(x), weight, scale, bias)


def multiply_rows(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``rows`` [T, K] and ``weight`` [N, K] in 8-bit floats, scaled by [T, 1] and [N], to [T, N] in bfloat16."""
    product: torch.Tensor = torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale, scale_b=scale.unsqueeze(0), bias=bias, out_dtype=torch.bfloat16
    )
    return product


def emulated_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The numbers of ``scaled_product``, multiplied in float32: shows on a CPU what a GPU would answer."""
    return emulated_rows(*quantize_rows(x), weight, scale, bias, dtype=x.dtype)


def emulated_rows(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The numbers of ``multiply_rows``, in ``dtype``."""
    product = functional.linear(widen(rows, torch.float32), widen(weight, torch.float32))
    return _finish(product.mul_(row_scale).mul_(scale), bias, dtype)


def widened_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Weights alone in 8 bits, widened to the dtype of ``x`` for the product."""
    wide = _widened(weight, x.dtype).mul_(scale.unsqueeze(1))
    return functional.linear(x, wide, None if bias is None else bias.to(x.dtype))


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Weights alone in int8, on a CPU: packed for a few bfloat16 rows, else widened to float32."""
    if x.dtype is torch.bfloat16 and len(x) <= _FEW_ROWS and all(size % _PACKED == 0 for size in weight.shape):
        # The scales are bfloat16 numbers, see ``quantize_int8``.
        packed: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale.to(x.dtype))
        return packed if bias is None else packed.add_(bias)
    return _finish(functional.linear(x.float(), weight.float()).mul_(scale), bias, x.dtype)


def _widened(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if weight.dtype is torch.int8 else widen(weight, dtype)


def _finish(product: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (product if bias is None else product.add_(bias)).to(dtype)
