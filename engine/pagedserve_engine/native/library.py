"""The compiled kernels as Python calls them: structures mirrored, functions typed, errors raised.

The library runs on the threads of torch's own OpenMP pool, on as many as torch uses.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Final

import torch

from pagedserve_engine.native.build import LIBRARY, digest

logger = logging.getLogger(__name__)

VARIANTS: Final = {"portable": 0, "avx2": 1, "avx512": 2}
"""Instruction sets, the widest last."""

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_DTYPES: Final = {**DTYPES, torch.float8_e4m3fn: 3}

_NO_VARIANT, _NO_MEMORY = 1, 2
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class MissingLibraryError(Exception):
    """The kernels are not there, or not those of this source; the message says what to do."""


class AttentionCall(ctypes.Structure):
    """See source/kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "keys", "values", "out", "table", "query_starts", "seq_lens")),
        *((name, _LONG) for name in ("query_stride", "head_stride", "table_stride")),
        *((name, _INT) for name in ("rows", "heads", "kv_heads", "head_dim", "block_size", "window")),
        *((name, _INT) for name in ("dtype", "cache_dtype")),
        *((name, _FLOAT) for name in ("scaling", "softcap")),
        *((name, _INT) for name in ("threads", "variant")),
    )


class ProductCall(ctypes.Structure):
    """See source/kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "bias", "out")),
        *((name, _LONG) for name in ("tokens", "in_features", "out_features")),
        *((name, _INT) for name in ("dtype", "weight_dtype")),
    )


class NormCall(ctypes.Structure):
    """See source/kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "residual", "weight", "out")),
        *((name, _LONG) for name in ("tokens", "width")),
        *((name, _FLOAT) for name in ("eps", "offset")),
        ("dtype", _INT),
    )


class RopeCall(ctypes.Structure):
    """See source/kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "q_norm", "k_norm", "cos_sin", "positions", "write_indices")),
        *((name, _POINTER) for name in ("keys", "values", "query")),
        *((name, _LONG) for name in ("tokens", "qkv_stride")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, _FLOAT) for name in ("eps", "offset")),
        *((name, _INT) for name in ("dtype", "cache_dtype")),
    )


class GatedCall(ctypes.Structure):
    """See source/kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("gate_up", "out")),
        *((name, _LONG) for name in ("tokens", "width")),
        *((name, _INT) for name in ("activation", "dtype")),
    )


class Library:
    """The loaded kernels."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        loaded.pagedserve_packed_size.restype = _LONG
        loaded.pagedserve_packed_size.argtypes = [_INT, _LONG, _LONG]
        loaded.pagedserve_pack.argtypes = [_INT, _POINTER, _POINTER, _LONG, _LONG, _INT]
        loaded.pagedserve_linear.argtypes = [_POINTER, _POINTER, _INT, _INT]
        loaded.pagedserve_attend.argtypes = [_POINTER]
        for name in ("norm", "rope", "gated"):
            loaded[f"pagedserve_{name}"].argtypes = [_POINTER, _INT, _INT]
        self._norm, self._rope, self._gated = loaded.pagedserve_norm, loaded.pagedserve_rope, loaded.pagedserve_gated
        self._attend, self._linear = loaded.pagedserve_attend, loaded.pagedserve_linear
        self.variants = tuple(name for name, number in VARIANTS.items() if loaded.pagedserve_lanes(number))
        """Instruction sets that this processor has, the widest last."""

    def lanes(self, variant: str) -> int:
        """Floats of a vector; 0 where this processor does not have the instruction set."""
        return int(self._loaded.pagedserve_lanes(VARIANTS[variant]))

    def choose(self, width: int) -> str:
        """The widest instruction set of which whole vectors fill ``width`` numbers."""
        return next(name for name in reversed(self.variants) if width % self.lanes(name) == 0)

    def attend(self, call: AttentionCall) -> None:
        """Run one layer's attention."""
        _check(self._attend(ctypes.byref(call)))

    def pack(self, weight: torch.Tensor, variant: str) -> torch.Tensor:
        """``weight`` [N, K] in the order in which ``linear`` reads it, N rounded up to whole panels."""
        number, (outputs, inputs) = VARIANTS[variant], weight.shape
        packed = weight.new_empty(self._loaded.pagedserve_packed_size(number, inputs, outputs))
        weight = weight.contiguous()
        _check(
            self._loaded.pagedserve_pack(
                number, weight.data_ptr(), packed.data_ptr(), inputs, outputs, DTYPES[weight.dtype]
            )
        )
        return packed

    def linear(self, call: ProductCall, x: torch.Tensor, variant: str) -> None:
        """Multiply ``x`` [T, K] by a packed weight."""
        _check(self._linear(ctypes.byref(call), x.data_ptr(), VARIANTS[variant], torch.get_num_threads()))

    def norm(self, call: NormCall, variant: str) -> None:
        """Norm every row."""
        _check(self._norm(ctypes.byref(call), VARIANTS[variant], torch.get_num_threads()))

    def rope(self, call: RopeCall, variant: str) -> None:
        """Rotate queries and keys; write keys and values."""
        _check(self._rope(ctypes.byref(call), VARIANTS[variant], torch.get_num_threads()))

    def gated(self, call: GatedCall, variant: str) -> None:
        """Multiply the activated first half of every row by the second."""
        _check(self._gated(ctypes.byref(call), VARIANTS[variant], torch.get_num_threads()))


@functools.cache
def load_library() -> Library:
    """The kernels; raises MissingLibraryError where they were not compiled, or from another source."""
    if not LIBRARY.exists():
        raise MissingLibraryError(
            "no C++ compiler was there when the engine was installed: install g++ and reinstall the engine"
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise MissingLibraryError(f"the compiled kernels can't be loaded ({error}): reinstall the engine") from error
    loaded.pagedserve_digest.restype = ctypes.c_char_p
    if loaded.pagedserve_digest() != digest().encode():
        raise MissingLibraryError("the compiled kernels are not those of this source: reinstall the engine")
    try:
        launcher = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        logger.warning("torch's OpenMP is not GNU's: the compiled kernels run on one thread")
    else:
        loaded.pagedserve_use_launcher(ctypes.cast(launcher, _POINTER))
    return Library(loaded)


def _check(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("the compiled kernels got no memory")
    if status == _NO_VARIANT:
        raise ValueError("this processor does not have the instruction set")
