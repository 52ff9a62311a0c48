"""What a fused decoder computes between its products and attention, behind one protocol.

The torch implementation runs on every device and says what the others must compute. Which one a device gets is decided
here and nowhere else. Nothing here waits for the device or has shapes that depend on data, so that whole steps can be
captured as CUDA graphs.
"""

from __future__ import annotations

import logging
from typing import Literal, Protocol, runtime_checkable

import torch
from torch.nn import functional

from pagedserve_engine.attention.interface import store
from pagedserve_engine.model.quantization_products import quantize_rows
from pagedserve_engine.native.library import MissingLibraryError, load_library
from pagedserve_engine.native.ops import NativeOps

logger = logging.getLogger(__name__)

Activation = Literal["silu", "gelu_tanh"]
Rows = tuple[torch.Tensor, torch.Tensor]
"""[T, K] in 8-bit floats, and the scale [T, 1] float32 of each row."""


class Ops(Protocol):
    """The operations of a decoder layer that are fused; T tokens, d numbers in a head."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> torch.Tensor:
        """[T, H] to its norm, in float32 inside; with a ``residual`` x is added to it in place and the sum is normed.

        ``offset`` 0 multiplies by ``weight`` after rounding (Llama), 1 by 1 + ``weight`` before it (Gemma).
        """

    def rope_and_write(
        self,
        qkv: torch.Tensor,
        *,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        write_indices: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: int,
        eps: float,
        offset: float,
    ) -> torch.Tensor:
        """Rotated queries [T, heads, d] of ``qkv`` [T, (heads + 2 · kv_heads) · d]; keys and values go to the cache.

        Norms [d] apply to each head before the rotation. A row of ``cos_sin`` [positions, rotary_dim], float32, has the
        cosines of each pair, then the sines; number i of a head pairs with number i + rotary_dim / 2. Pages of ``keys``
        and ``values`` [blocks, block_size, kv_heads, d] are counted flat by ``write_indices`` [T]; -1 is written to
        no page that anybody reads.
        """

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """[T, 2 · I] to [T, I]: the activated first half times the second."""


@runtime_checkable
class QuantizingOps(Protocol):
    """Operations that round what they give to 8-bit floats, for products that would do so first thing."""

    def add_rms_norm_quantized(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> Rows:
        """The rows of ``Ops.add_rms_norm``."""

    def gated_quantized(self, gate_up: torch.Tensor, activation: Activation) -> Rows:
        """The rows of ``Ops.gated``."""


class TorchOps:
    """The operations in plain torch."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> torch.Tensor:
        """See ``Ops``."""
        if residual is not None:
            x = residual.add_(x)
        return _rms_norm(x, weight, eps, offset=offset)

    def rope_and_write(
        self,
        qkv: torch.Tensor,
        *,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        write_indices: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: int,
        eps: float,
        offset: float,
    ) -> torch.Tensor:
        """See ``Ops``."""
        kv_heads, head_dim = keys.shape[-2:]
        split = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
        turning, value = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
        if q_norm is not None and k_norm is not None:
            query = _rms_norm(turning[:, :heads], q_norm, eps, offset=offset)
            turning = torch.cat((query, _rms_norm(turning[:, heads:], k_norm, eps, offset=offset)), dim=1)
        turned = _rotate(turning, cos_sin.index_select(0, positions))
        # Padding writes to the null block, which nobody reads unmasked.
        places = write_indices.clamp(min=0)
        store(keys, turned[:, heads:], places)
        store(values, value, places)
        return turned[:, :heads]

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See ``Ops``."""
        gate, up = gate_up.chunk(2, dim=-1)
        active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
        return active.mul_(up)

    def add_rms_norm_quantized(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> Rows:
        """See ``QuantizingOps``."""
        return quantize_rows(self.add_rms_norm(x, residual, weight, eps, offset=offset))

    def gated_quantized(self, gate_up: torch.Tensor, activation: Activation) -> Rows:
        """See ``QuantizingOps``."""
        return quantize_rows(self.gated(gate_up, activation))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * weight


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """``x`` [T, heads, d] turned by ``cos_sin`` [T, rotary_dim], rounded once to the dtype of ``x``."""
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = rotary_dim // 2
    out[..., :half] = first * cos - second * sin
    out[..., half:rotary_dim] = second * cos + first * sin
    if rotary_dim < x.shape[-1]:
        out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def choose_ops(device: torch.device) -> Ops:
    """The fastest operations that are there for ``device``; those of torch, with a warning, where it has no others."""
    try:
        if device.type == "cuda":
            # Builds of torch without CUDA come without Triton.
            from pagedserve_engine.kernels.ops import TritonOps

            return TritonOps()
        return NativeOps(load_library())
    except (ImportError, MissingLibraryError) as error:
        logger.warning("the decoder's small operations run in torch, which is slower: %s", error)
        return TorchOps()
