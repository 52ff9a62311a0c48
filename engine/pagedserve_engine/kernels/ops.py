"""The fused decoder's operations on a CUDA device: what each kernel is launched with.

Every launch says that multiplications and additions may be fused: newer compilers warn where it is left open.
"""

from __future__ import annotations

from typing import Literal

import torch

from pagedserve_engine.kernels.floats import loadable
from pagedserve_engine.kernels.norms import gate_kernel, gate_quantize_kernel, norm_kernel, quantize_kernel
from pagedserve_engine.kernels.rope import rope_kernel

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Rows [T, K] in 8-bit floats, and the scale [T, 1] float32 of each."""

_GATE_SIZE = 1024
"""Numbers of a row that one program gates."""

_ROPE_NUMBERS = 1024
"""Numbers of a token that one program rotates."""


class TritonOps:
    """The operations as Triton kernels; ``Ops`` says what they compute."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> torch.Tensor:
        """See ``Ops``; x [T, H] with rows that may lie apart, ``residual`` contiguous."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _norm(x, residual, weight, eps, offset=offset, out=out, scales=None)
        return out

    def add_rms_norm_quantized(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, offset: float
    ) -> Quantized:
        """The norm in 8-bit floats with a scale for each row, instead of ``quantize_rows`` after it."""
        out, scales = _quantized(x, x.shape[-1])
        _norm(x, residual, weight, eps, offset=offset, out=out, scales=scales)
        return out, scales

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
        """See ``Ops``; ``write_indices`` of -1 write nothing."""
        kv_heads, head_dim = keys.shape[-2:]
        all_heads = heads + 2 * kv_heads
        query = torch.empty(len(qkv), heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        padded = _padded(head_dim)
        size = min(_padded(all_heads), max(_ROPE_NUMBERS // padded, 1))
        rope_kernel[len(qkv), -(-all_heads // size)](
            qkv,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            cos_sin,
            positions,
            write_indices,
            query,
            loadable(keys),
            loadable(values),
            qkv.stride(0),
            eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=cos_sin.shape[1],
            OFFSET=float(offset),
            NORMED=q_norm is not None and k_norm is not None,
            D=padded,
            SIZE=size,
            enable_fp_fusion=True,
        )
        return query

    def gated(self, gate_up: torch.Tensor, activation: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
        """See ``Ops``."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        size = min(_padded(width), _GATE_SIZE)
        grid = (rows, -(-width // size))
        gate_kernel[grid](
            gate_up,
            out,
            gate_up.stride(0),
            WIDTH=width,
            SIZE=size,
            SILU=activation == "silu",
            enable_fp_fusion=True,
        )
        return out

    def gated_quantized(self, gate_up: torch.Tensor, activation: Literal["silu", "gelu_tanh"]) -> Quantized:
        """The gated row in 8-bit floats with a scale for each row."""
        width = gate_up.shape[1] // 2
        out, scales = _quantized(gate_up, width)
        gate_quantize_kernel[(len(gate_up),)](
            gate_up,
            loadable(out),
            scales,
            gate_up.stride(0),
            WIDTH=width,
            PADDED=_padded(width),
            SILU=activation == "silu",
            num_warps=_warps(width),
            enable_fp_fusion=True,
        )
        return out, scales


def quantize_rows(x: torch.Tensor) -> Quantized:
    """``x`` [T, K] in 8-bit floats, each row scaled by its largest number's share of 448."""
    out, scales = _quantized(x, x.shape[1])
    width = x.shape[1]
    quantize_kernel[(len(x),)](
        x,
        loadable(out),
        scales,
        x.stride(0),
        WIDTH=width,
        PADDED=_padded(width),
        num_warps=_warps(width),
        enable_fp_fusion=True,
    )
    return out, scales


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    width = x.shape[-1]
    norm_kernel[(len(x),)](
        x,
        x if residual is None else residual,
        weight,
        loadable(out),
        x if scales is None else scales,
        x.stride(0),
        eps,
        WIDTH=width,
        PADDED=_padded(width),
        OFFSET=float(offset),
        ADDS=residual is not None,
        QUANTIZED=scales is not None,
        num_warps=_warps(width),
        enable_fp_fusion=True,
    )


def _quantized(x: torch.Tensor, width: int) -> Quantized:
    out = torch.empty(len(x), width, dtype=torch.float8_e4m3fn, device=x.device)
    return out, torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


def _padded(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _warps(width: int) -> int:
    """Warps for a row held in registers: 16 numbers to a thread, 4 warps to 16."""
    return min(max(_padded(width) // 512, 4), 16)
