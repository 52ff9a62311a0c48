"""Matrix products on CPUs that have none for 16-bit floats.

Such a CPU emulates them, several times slower than in float32. Holding the same 16-bit values in float32 and rounding
each product once to 16 bits computes what 16-bit hardware does (it accumulates in float32 as well), at float32's speed
and for twice the memory of the weights. Whether it pays is measured, once, at load.
"""

from __future__ import annotations

import logging
import time
from typing import TypeVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

logger = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)
_HALF = (torch.bfloat16, torch.float16)
_WORTH = 1.5
"""Times slower than float32 that the 16-bit product must be before it's replaced."""


class WideLinear(nn.Module):
    """``nn.Linear`` with its 16-bit values in float32: the product in float32, rounded once to the input's dtype."""

    def __init__(self, weight: nn.Parameter, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``."""
        return functional.linear(x.float(), self.weight, self.bias).to(x.dtype)


class WideEmbedding(nn.Module):
    """An embedding that reads its rows from the output layer's float32 table, and gives them in ``dtype``."""

    def __init__(self, embedding: nn.Embedding, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        embedding.padding_idx = None  # only gradients ask for it
        embedding.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self.inner = embedding

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...] ids to [..., hidden]: the inner embedding's own forward over a table of just these rows."""
        rows = functional.embedding(input_ids.reshape(-1), self.weight).to(self.dtype)
        places = torch.arange(len(rows), device=rows.device).view(input_ids.shape)
        found: torch.Tensor = functional_call(self.inner, {"weight": rows}, (places,))
        return found


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of ``dtype`` values are computed in on ``device``: float32 on a CPU that is slow at 16 bits."""
    if device.type != "cpu" or dtype not in _HALF:
        return dtype
    slowdown = measure_slowdown(dtype)
    if slowdown < _WORTH:
        return dtype
    logger.info("%s products are %.1f times slower than float32 here: weights are held in float32", dtype, slowdown)
    return torch.float32


def widen_products(model: nn.Module) -> bool:
    """Replace the model's linear layers if they are 16-bit, on a CPU, and slow there; whether it did."""
    linear = next((module for module in model.modules() if type(module) is nn.Linear), None)
    if linear is None or product_dtype(linear.weight.dtype, linear.weight.device) is linear.weight.dtype:
        return False
    widen(model)
    return True


def measure_slowdown(dtype: torch.dtype) -> float:
    """How many times longer a product of 32 rows takes in ``dtype`` than in float32, on this CPU."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(32, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
    functional.linear(x, weight)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return best


def widen(model: nn.Module) -> None:
    """Replace every 16-bit ``nn.Linear`` by a WideLinear, and embeddings tied to one by a WideEmbedding."""
    embeddings = {id(child.weight): (parent, name, child) for parent, name, child in _children(model, nn.Embedding)}
    for parent, name, linear in _children(model, nn.Linear):
        dtype = linear.weight.dtype
        if type(linear) is not nn.Linear or dtype not in _HALF:
            continue
        weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
        setattr(parent, name, WideLinear(weight, linear.bias))
        if id(linear.weight) in embeddings:
            owner, place, embedding = embeddings.pop(id(linear.weight))
            setattr(owner, place, WideEmbedding(embedding, weight, dtype))


def _children(model: nn.Module, kind: type[_Module]) -> list[tuple[nn.Module, str, _Module]]:
    """(Parent, name, child) of all modules of that kind."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
