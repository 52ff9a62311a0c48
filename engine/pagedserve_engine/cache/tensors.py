"""Storage of the cache: the only module of the package that holds tensors."""

from __future__ import annotations

import torch

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.float8 import FLOAT8, as_bytes


def choose_cache_dtype(setting: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that KV_CACHE_DTYPE names; ``auto`` is the model's ``dtype``, ``fp8`` 8-bit floats without a scale."""
    if setting == "auto":
        return dtype
    named: torch.dtype = FLOAT8 if setting == "fp8" else getattr(torch, setting)
    return named


class CacheTensors:
    """Keys and values, ``layers_per_group`` tensors each: [num_blocks, block_size, kv_heads, head_dim].

    Zeros at first: pages that were never written are masked, and masked numbers must not be NaN, see ``clear``. Raises
    ConfigError where ``dtype`` isn't the one that the layout counts with.
    """

    def __init__(self, layout: CacheLayout, num_blocks: int, dtype: torch.dtype, device: torch.device | str) -> None:
        if dtype.itemsize != layout.dtype_bytes:
            raise ConfigError(
                f"KV_CACHE_DTYPE is {dtype}, {dtype.itemsize} bytes a number, but the cache was planned "
                f"with {layout.dtype_bytes}: plan with the dtype that is used",
                param="kv_cache_dtype",
            )
        shape = (num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
        pairs = range(layout.layers_per_group)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in pairs]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in pairs]

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero ``blocks`` [any]: a NaN that their last owner left would reach the next one through its mask."""
        for tensor in (*self.keys, *self.values):
            as_bytes(tensor).index_fill_(0, blocks, 0)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: num_blocks * block_bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
