"""What a decoder computes between attention and attention, by compiled kernels: the torch formulas, fused.

Each norm, rotation with its cache write, gated activation and product is one call that reads its input once and writes
its output once. Sums are float32 and do not depend on what is batched beside a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pagedserve_engine.native.library import CACHE_DTYPES, DTYPES, GatedCall, Library, NormCall, ProductCall, RopeCall

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out_features, in_features] in the order in which one instruction set reads it."""

    numbers: torch.Tensor
    """[out_features rounded up to whole panels · in_features], in the weight's dtype."""
    out_features: int
    in_features: int


class NativeOps:
    """The fused operations of a decoder layer on a CPU; T tokens, d numbers in a head.

    All tensors are float32, bfloat16 or float16 (the cache may be 8-bit floats too), and their rows contiguous.
    ``variant`` names an instruction set, None chooses the widest.
    """

    def __init__(self, library: Library, variant: str | None = None) -> None:
        self._library = library
        self._variant = variant or library.variants[-1]

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> torch.Tensor:
        """[T, H] to its norm, in float32 inside; with a ``residual`` x is added to it in place and the sum is normed.

        ``offset`` 0 multiplies by ``weight`` after rounding (Llama), 1 by 1 + ``weight`` before it (Gemma).
        """
        x, weight = x.contiguous(), weight.to(x.dtype)
        out = torch.empty_like(x)
        call = NormCall(
            x=x.data_ptr(),
            residual=None if residual is None else _rows(residual, x).data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            tokens=x.numel() // x.shape[-1],
            width=x.shape[-1],
            eps=eps,
            offset=offset,
            dtype=DTYPES[x.dtype],
        )
        self._library.norm(call, self._variant)
        return out

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
        and ``values`` [blocks, block_size, kv_heads, d] are counted flat by ``write_indices`` [T]; -1 is nowhere.
        """
        kv_heads, head_dim = keys.shape[-2:]
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        query = qkv.new_empty(len(qkv), heads, head_dim)
        held = [None if norm is None else norm.to(qkv.dtype) for norm in (q_norm, k_norm)]
        table, positions, places = cos_sin.contiguous(), positions.contiguous(), write_indices.contiguous()
        if table.dtype != torch.float32 or positions.dtype != torch.int64 or places.dtype != torch.int64:
            raise TypeError("cos_sin must be float32, positions and write_indices int64")
        call = RopeCall(
            qkv=qkv.data_ptr(),
            q_norm=None if held[0] is None else held[0].data_ptr(),
            k_norm=None if held[1] is None else held[1].data_ptr(),
            cos_sin=table.data_ptr(),
            positions=positions.data_ptr(),
            write_indices=places.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            query=query.data_ptr(),
            tokens=len(qkv),
            qkv_stride=qkv.stride(0),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=table.shape[-1],
            eps=eps,
            offset=offset,
            dtype=DTYPES[qkv.dtype],
            cache_dtype=CACHE_DTYPES[keys.dtype],
        )
        self._library.rope(call, self._variant)
        return query

    def gated(self, gate_up: torch.Tensor, activation: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
        """[T, 2 · I] to [T, I]: the activated first half times the second."""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        call = GatedCall(
            gate_up=gate_up.data_ptr(),
            out=out.data_ptr(),
            tokens=gate_up.numel() // (2 * width),
            width=width,
            activation=_ACTIVATIONS[activation],
            dtype=DTYPES[gate_up.dtype],
        )
        self._library.gated(call, self._variant)
        return out

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """``weight`` [N, K] in float32, bfloat16 or float16 as ``linear`` reads it fastest; the same bytes again."""
        return PackedWeight(self._library.pack(weight, self._variant), *weight.shape)

    def linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] times ``weight`` [N, K] transposed, in the dtype of ``x``, with products and sums in float32."""
        x = x.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        out = x.new_empty(*x.shape[:-1], weight.out_features)
        call = ProductCall(
            weight=weight.numbers.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            tokens=x.numel() // weight.in_features,
            in_features=weight.in_features,
            out_features=weight.out_features,
            dtype=DTYPES[x.dtype],
            weight_dtype=DTYPES[weight.numbers.dtype],
        )
        self._library.linear(call, x, self._variant)
        return out


def _rows(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor``, that is written in place, if it is what the kernels take; raises TypeError otherwise."""
    if tensor.dtype != like.dtype or tensor.shape != like.shape or not tensor.is_contiguous():
        raise TypeError(f"the residual must be contiguous, {like.dtype} and {list(like.shape)}")
    return tensor
