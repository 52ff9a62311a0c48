"""Block arithmetic: how a model's shape becomes groups of layers, and memory becomes blocks.

Layers of one attention type are split into groups of equally many layers, so that a block costs the same bytes in every
group and one pool serves them all. A page is one token of the layers of one group; a block is ``block_size`` pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt

from pagedserve_engine.errors import UnsupportedModelError

AttentionKind = Literal["full", "sliding"]

Int32Array = npt.NDArray[np.int32]
"""Block ids, positions and page indices."""

UNBOUNDED: Final = 2**31 - 1
"""Tokens: the length of a sequence that memory doesn't limit. Positions are int32."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a block table; ``window`` (tokens, the current one counted) is None for full attention."""

    index: int
    kind: AttentionKind
    window: int | None
    layers: tuple[int, ...]


def group_layers(layer_types: Sequence[str], window: int | None) -> tuple[LayerGroup, ...]:
    """Groups of equally many layers, full attention first; ``layer_types`` is "full" or "sliding" for each layer.

    Raises UnsupportedModelError for another type, or for sliding layers without a ``window`` of at least one token.
    """
    by_kind: dict[AttentionKind, list[int]] = {"full": [], "sliding": []}
    for layer, kind in enumerate(layer_types):
        if kind not in by_kind:
            raise UnsupportedModelError(
                f"layer {layer} has attention of type {kind!r}: the paged cache serves 'full' and 'sliding'",
                param="layer_types",
            )
        by_kind[kind].append(layer)
    if not layer_types:
        raise UnsupportedModelError("the model has no attention layers: nothing to cache", param="layer_types")
    if by_kind["sliding"] and (window is None or window < 1):
        raise UnsupportedModelError(
            f"sliding_window is {window}, but layers {by_kind['sliding']} are sliding: "
            "give a window of at least 1 token",
            param="sliding_window",
        )
    size = gcd(len(by_kind["full"]), len(by_kind["sliding"]))
    groups: list[LayerGroup] = []
    for kind, layers in by_kind.items():
        for start in range(0, len(layers), size):
            members = tuple(layers[start : start + size])
            groups.append(LayerGroup(len(groups), kind, window if kind == "sliding" else None, members))
    return tuple(groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """The cache's shape: the j-th layer of every group uses the j-th pair of K and V tensors."""

    groups: tuple[LayerGroup, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens of a block."""
    dtype_bytes: int
    """Bytes of one number in the cache."""

    @classmethod
    def build(
        cls,
        layer_types: Sequence[str],
        *,
        window: int | None,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype_bytes: int,
    ) -> Self:
        """The layout of a model with these layers; raises UnsupportedModelError as ``group_layers`` does."""
        return cls(
            groups=group_layers(layer_types, window),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype_bytes=dtype_bytes,
        )

    @property
    def layers_per_group(self) -> int:
        """Layers of each group, which is the number of pairs of cache tensors."""
        return len(self.groups[0].layers)

    @property
    def page_bytes(self) -> int:
        """Bytes of one token's keys in one layer; its values take as many."""
        return self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of ``block_size`` tokens in the layers of one group."""
        return 2 * self.layers_per_group * self.page_bytes * self.block_size

    @property
    def window(self) -> int | None:
        """The sliding groups' window in tokens, None where there are none; all share one."""
        return next((group.window for group in self.groups if group.window is not None), None)

    def place(self, layer: int) -> tuple[int, int]:
        """The layer's (group, index in the group); raises KeyError for a layer that the cache doesn't hold."""
        for group in self.groups:
            if layer in group.layers:
                return group.index, group.layers.index(layer)
        raise KeyError(layer)

    def max_blocks_per_sequence(self, max_model_len: int) -> int:
        """Entries that one row of a block table needs for sequences of up to ``max_model_len`` tokens."""
        return -(-max_model_len // self.block_size)

    def blocks_for(self, num_tokens: int, chunk: int) -> int:
        """The most blocks, all groups together, that one sequence of ``num_tokens`` tokens holds at once.

        Holds for every split of the prefill into chunks of at most ``chunk`` tokens.
        """
        return sum(self._group_blocks(group, num_tokens, chunk) for group in self.groups)

    def largest_length(self, num_blocks: int, chunk: int) -> int:
        """The longest sequence (tokens) that a pool of ``num_blocks``, the null block included, holds alone.

        0 where not even one token fits, UNBOUNDED where the windows alone bound what a sequence takes.
        """
        usable = num_blocks - 1
        if self.blocks_for(UNBOUNDED, chunk) <= usable:
            return UNBOUNDED
        fits, too_long = 0, UNBOUNDED
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.blocks_for(middle, chunk) <= usable:
                fits = middle
            else:
                too_long = middle
        return fits

    def _group_blocks(self, group: LayerGroup, num_tokens: int, chunk: int) -> int:
        blocks = -(-num_tokens // self.block_size)
        if group.window is None:
            return blocks
        # The chunk's first query looks back window - 1 tokens. In the worst alignment a span of n tokens begins on a
        # block's last page, so that n - 1 tokens follow from the next block on.
        span = group.window - 1 + chunk
        return min(blocks, 1 + -(-(span - 1) // self.block_size))
