"""Products with 8-bit weights on a CUDA device that has triton; see ``quantization_products`` for what they compute."""

from __future__ import annotations

import functools

import torch

from pagedserve_engine.kernels.ops import quantize_rows
from pagedserve_engine.kernels.products import MAX_ROWS, int8_linear
from pagedserve_engine.model.quantization_products import multiply_rows, widened_product


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As torch's, with the rows of ``x`` rounded by one kernel."""
    if x.dtype is not torch.bfloat16:
        return widened_product(x, weight, scale, bias)
    rows, row_scale = quantize_rows(x)
    return multiply_rows(rows, row_scale, weight, scale, bias)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The weight widened on its way to the product for a decoding step's rows, once in memory for more."""
    if len(x) > MAX_ROWS:
        return widened_product(x, weight, scale, bias)
    product = int8_linear(x, weight, scale, processors=_processors(x.device))
    return product if bias is None else product.add_(bias)


@functools.cache
def _processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
