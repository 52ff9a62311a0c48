"""How a device multiplies with weights: the form in which they are held, chosen by measurement, once, at load.

A CPU without products of 16-bit floats emulates them, several times slower than in float32. The compiled kernels read
16-bit weights as they are, in an order of their own, and compute in float32: on such a CPU they are the fastest, and in
float32 as well where rows are few. Without them the same 16-bit values are held in float32, at float32's speed and
for twice the memory. Either way a product is rounded once, to what 16-bit hardware gives: it sums in float32 too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from pagedserve_engine.model.ops import Ops
from pagedserve_engine.native.ops import NativeOps, PackedWeight

logger = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]
"""From a product's weight [out, in] and bias to the module that stands in its place."""

_SIZE = 768
"""Of the weights that are timed."""
_HALF = (torch.bfloat16, torch.float16)
_WORTH = 1.5
"""Times slower than float32 that the 16-bit product must be before it's replaced."""


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., K] times ``weight`` [N, K] transposed, in the weight's dtype, rounded once to that of ``x``."""
    if x.dtype == weight.dtype:
        return functional.linear(x, weight, bias)
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class WideLinear(nn.Module):
    """``nn.Linear`` with its 16-bit values in float32: the product in float32, rounded once to the input's dtype."""

    def __init__(self, weight: nn.Parameter, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``."""
        return product(x, self.weight, self.bias)


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


@dataclass(frozen=True, slots=True)
class Products:
    """The forms that a decoder's products take once their weights are there; None leaves them plain."""

    weight_dtype: torch.dtype
    """Of plain weights."""
    layer: MakeLinear | None = None
    output: MakeLinear | None = None
    """For an output layer that is not the embedding."""
    tied: Callable[[torch.Tensor], tuple[nn.Module, nn.Module]] | None = None
    """From the one table [tokens, hidden] to embedding and output layer."""


class PackedLinear(nn.Module):
    """A product with a weight [out, in] in the order in which the compiled kernels read it."""

    def __init__(self, ops: NativeOps, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        packed = ops.pack(weight.detach())
        self._ops = ops
        self.numbers = nn.Buffer(packed.numbers)
        self.bias = None if bias is None else nn.Buffer(bias.detach().float())
        self.out_features, self.in_features = packed.out_features, packed.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out], summed in float32 and rounded once."""
        return self._ops.linear(x, PackedWeight(self.numbers, self.out_features, self.in_features), self.bias)


class PackedEmbedding(nn.Module):
    """An embedding that reads its rows from a packed output layer's weight."""

    def __init__(self, head: PackedLinear, panel: int) -> None:
        super().__init__()
        self._panel = panel
        # [panels, hidden, rows of a panel]; shared with the output layer, so no state of this module's own.
        self._table = head.numbers.view(-1, head.in_features, panel)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden]"""
        return self._table[token_ids // self._panel, :, token_ids % self._panel]


def choose_products(
    ops: Ops, dtype: torch.dtype, device: torch.device, *, quantize: MakeLinear | None = None
) -> Products:
    """What is fastest on ``device``, for values of ``dtype``; ``quantize`` makes the layers' products small."""
    if isinstance(ops, NativeOps) and packed_slowdown(ops, dtype) < 1.0:
        pack = partial(PackedLinear, ops)
        logger.info("products run in compiled kernels, which read %s weights in an order of their own", dtype)
        return Products(dtype, quantize or pack, pack, partial(_pack_tied, ops))
    # Quantisation starts from the values as they are served.
    return Products(product_dtype(dtype, device) if quantize is None else dtype, quantize)


def _pack_tied(ops: NativeOps, table: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    head = PackedLinear(ops, table, None)
    return PackedEmbedding(head, _panel_rows(ops)), head


def _panel_rows(ops: NativeOps) -> int:
    """Rows that stand side by side in a packed weight, column after column."""
    rows = torch.arange(256.0).unsqueeze(1).expand(-1, 2)
    packed = ops.pack(rows.contiguous()).numbers
    return int((packed == 0).nonzero()[1])


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


def packed_slowdown(ops: NativeOps, dtype: torch.dtype) -> float:
    """How many times longer a product of 32 rows takes in the compiled kernels than in torch's faster way."""
    packed = PackedLinear(ops, torch.ones(_SIZE, _SIZE, dtype=dtype), None)
    x = torch.ones(32, _SIZE, dtype=dtype)
    return _best(lambda: packed(x)) / min(_seconds(dtype), _seconds(torch.float32))


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(32, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    return _best(lambda: functional.linear(x, weight))


def _best(work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        work()
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
