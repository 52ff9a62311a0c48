"""Weights in 8 bits, made at load from wide ones: half the memory and half of what a decoding step must read.

Each output of a linear layer has a scale of its own, so that layers may be fused or split along their outputs and keep
their numbers. Only linear layers of the decoder's blocks are made small. Embeddings and the output layer stay wide:
they are often one table, every logit hangs on them directly, and rounding there costs more quality than anywhere else.
Norms and routers weigh nothing and decide much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from pagedserve_engine.errors import ConfigError, UnsupportedModelError
from pagedserve_engine.float8 import FLOAT8, LARGEST, narrow
from pagedserve_engine.model.quantization_products import (
    SMALLEST_SCALE,
    Product,
    RowsProduct,
    emulated_product,
    emulated_rows,
    int8_product,
    multiply_rows,
    scaled_product,
    widened_product,
)

logger = logging.getLogger(__name__)

Capability = tuple[int, int]
"""CUDA compute capability."""
Quantize = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]
"""(Wide weight [N, K], bias [N] or None), on their device, to a module that computes the same from 8 bits."""

_LARGEST_INT8: Final = 127
_FIRST_WITH_BFLOAT16: Final = (8, 0)
_FIRST_WITH_FLOAT8: Final = (8, 9)
_ALIGNMENT: Final = 16
"""Numbers: what the 8-bit float product asks of both sides of a weight."""
_ROUTERS: Final = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of the linear layers that choose or weigh experts."""


class QuantizedLinear(nn.Module):
    """``nn.Linear`` with an 8-bit ``weight`` [N, K] and a float32 ``scale`` [N].

    With a ``rows_product`` it also takes rows that whoever makes them rounds to 8 bits himself.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        product: Product,
        *,
        rows_product: RowsProduct | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight.shape
        self._product, self._rows_product = product, rows_product

    @property
    def takes_rows(self) -> bool:
        """Whether ``of_rows`` is there."""
        return self._rows_product is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N], in the dtype of ``x``."""
        rows = self._product(x.reshape(-1, self.in_features), self.weight, self.scale, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)

    def of_rows(self, rows: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
        """[T, K] in 8-bit floats with the scale [T, 1] of each to [T, N], in the dtype that the weight had."""
        assert self._rows_product is not None
        return self._rows_product(rows, row_scale, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` prints itself."""
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, {self._product.__name__}"


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] as 8-bit floats, and the scale [N] that gives the numbers back."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=1).div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    return narrow(wide / scale.unsqueeze(1)), scale


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] as whole numbers from -127 to 127, and the scale [N] that gives the numbers back.

    Scales are float32 but hold bfloat16 numbers: products that take them so lose nothing.
    """
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=1).div_(_LARGEST_INT8).clamp_min_(SMALLEST_SCALE).bfloat16().float()
    rounded = (wide / scale.unsqueeze(1)).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
    return rounded.to(torch.int8), scale


def choose_quantization(setting: str, device: torch.device, *, capability: Capability | None = None) -> Quantize | None:
    """What QUANTIZATION asks for on ``device``; None leaves weights as they are. ``capability``: asked where not given.

    Raises ConfigError where the device can't serve it.
    """
    if setting == "none":
        return None
    if device.type == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability(device)
    if setting == "int8":
        return partial(_int8_linear, product=_choose_int8(capability))
    if capability is None:
        logger.info("QUANTIZATION=fp8 on a CPU computes what a GPU would, slowly: int8 is the faster choice here")
        return partial(_fp8_linear, product=emulated_product, otherwise=emulated_product)
    if capability < _FIRST_WITH_BFLOAT16:
        raise ConfigError(
            f"QUANTIZATION is fp8, and compute capability {capability[0]}.{capability[1]} of {device} is too old for "
            "it: set it to int8 or none, or use a card of 8.9 or later",
            param="quantization",
        )
    if capability < _FIRST_WITH_FLOAT8:
        logger.warning(
            "QUANTIZATION=fp8 saves memory alone on compute capability %d.%d, which multiplies no 8-bit floats: "
            "set it to int8, or use a card of 8.9 or later",
            *capability,
        )
        return partial(_fp8_linear, product=widened_product, otherwise=widened_product)
    kernels = _kernels()
    scaled = scaled_product if kernels is None else kernels.scaled_product
    return partial(_fp8_linear, product=scaled, otherwise=widened_product)


def _choose_int8(capability: Capability | None) -> Product:
    if capability is None:
        return int8_product
    kernels = _kernels() if capability >= _FIRST_WITH_BFLOAT16 else None
    return widened_product if kernels is None else kernels.int8_product


def _kernels() -> Any:
    """The module of Triton products; None where triton isn't installed."""
    try:
        from pagedserve_engine.model import quantization_kernels
    except ImportError as error:
        logger.warning("8-bit products run in torch, which is slower: %s", error)
        return None
    return quantization_kernels


def quantize_model(model: nn.Module, quantize: Quantize, *, device: torch.device | None = None) -> None:
    """Replace the linear layers of a transformers model, but its output layer and routers, one after another.

    Each weight is moved to ``device`` first where one is given, so that a model that was read elsewhere never lies
    there wide; what else the model holds stays where it is. Raises ConfigError where there is nothing to replace.
    """
    found = list(_linears(model))
    if not found:
        raise ConfigError(
            f"QUANTIZATION can't be served: {type(model).__name__} has no linear layers that could be made smaller; "
            "set it to none",
            param="quantization",
        )
    before = sum(parameter.numel() for parameter in model.parameters())
    small = sum(linear.weight.numel() for _, _, linear in found)
    for parent, name, linear in found:
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if device is not None:
            weight, bias = weight.to(device), None if bias is None else bias.to(device)
        setattr(parent, name, quantize(weight, bias))
    logger.info("%d of %d million parameters are held in 8 bits", small // 10**6, before // 10**6)


def scratch_bytes(model: nn.Module) -> int:
    """The most that one quantised layer of ``model`` takes beside inputs and outputs while it runs on a CPU."""
    sizes = (
        module.weight.numel() * (8 if module.weight.dtype is FLOAT8 else 4)
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    return max(sizes, default=0)


def refuse_quantized(config: Any) -> None:
    """Raise UnsupportedModelError where a checkpoint's transformers configuration says that it is quantised already."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return
    given = settings if isinstance(settings, dict) else vars(settings)
    method = getattr(given.get("quant_method"), "value", given.get("quant_method")) or "an unnamed method"
    raise UnsupportedModelError(
        f"the model's weights are quantised already ({method}), and this engine reads plain weights only: set MODEL to "
        "the model that they were made from, and QUANTIZATION to fp8 or int8 to have it quantised at load",
        param="model",
    )


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(Parent, name, layer) of the linear layers that may be made small."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child is not output and name not in _ROUTERS:
                yield parent, name, child


def _fp8_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, *, product: Product, otherwise: Product
) -> QuantizedLinear:
    """``otherwise`` serves sides that the cards' product doesn't take."""
    if any(size % _ALIGNMENT for size in weight.shape):
        return QuantizedLinear(*quantize_fp8(weight), bias, otherwise)
    return QuantizedLinear(*quantize_fp8(weight), bias, product, rows_product=_rows_product(product, weight.dtype))


def _rows_product(product: Product, dtype: torch.dtype) -> RowsProduct | None:
    """``product`` without its rounding of rows; None where it rounds none."""
    if product is emulated_product:
        return partial(emulated_rows, dtype=dtype)
    # The cards' product gives bfloat16 only.
    return None if product is widened_product or dtype is not torch.bfloat16 else multiply_rows


def _int8_linear(weight: torch.Tensor, bias: torch.Tensor | None, *, product: Product) -> QuantizedLinear:
    return QuantizedLinear(*quantize_int8(weight), bias, product)
