"""Eight-bit floats (e4m3fn), also where no instruction converts them: their bits, moved by integer arithmetic.

Cards from compute capability 8.9 convert in one instruction, and get tensors of the type itself; the others get the
same bytes as uint8. Which of the two a kernel meets is fixed when it is compiled.
"""

# Kernels are compiled, not called: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

NATIVE_FP8 = (8, 9)
"""The least compute capability that converts e4m3."""


def loadable(numbers: torch.Tensor) -> torch.Tensor:
    """``numbers`` as a kernel on their device can take them: e4m3 as bytes where it can't convert that type."""
    if numbers.dtype is not torch.float8_e4m3fn or _converts(numbers.device):
        return numbers
    return numbers.view(torch.uint8)


@functools.cache
def _converts(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= NATIVE_FP8


@triton.jit
def widen(x, dtype: tl.constexpr):
    """The numbers ``x`` as ``dtype``; a NaN in bytes becomes 480, which no writer stores."""
    if x.dtype == tl.uint8:
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        # float16 has the same fields with an exponent that counts from 15, not 7.
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """The float32 numbers ``x`` as ``dtype``, rounded to even; eight bits saturate at ±448."""
    if dtype == tl.uint8:
        # Scaled so that float32's exponent counts as e4m3's does, subnormals included; a NaN becomes 448.
        bounded = tl.minimum(tl.maximum(x, -448.0), 448.0) * 7.52316384526264e-37
        bits = bounded.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
        return (rounded | ((bits >> 24) & 0x80)).to(tl.uint8)
    elif dtype == tl.float8e4nv:
        return tl.minimum(tl.maximum(x, -448.0), 448.0).to(dtype)
    else:
        return x.to(dtype)
