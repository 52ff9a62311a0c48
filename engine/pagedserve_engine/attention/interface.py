"""How transformers calls us, and what a step tells attention.

transformers hands each attention layer's query, key and value to the function that is registered under
``ATTENTION_NAME`` and passes the step's ``PagedStep`` on as the keyword ``paged``. The function writes the step's keys
and values into the cache, then a backend attends over the cache. Writing comes first for the whole step: a row may
therefore read blocks that another row of the same step fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from pagedserve_engine.batch import Int32Array
from pagedserve_engine.errors import UnsupportedModelError
from pagedserve_engine.float8 import FLOAT8, as_bytes, narrow

ATTENTION_NAME = "pagedserve"

_IGNORED = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "cache_position"}
)
"""Keywords that models pass on to attention and that change nothing in it."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's attention call: query [T, heads, head_dim], its cache tensors and what shapes the scores."""

    query: torch.Tensor
    keys: torch.Tensor
    """[blocks, block_size, kv_heads, head_dim]"""
    values: torch.Tensor
    scaling: float
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInputs:
    """One layer group's part of a step, as a backend gets it; R rows, T query tokens, the rows' side by side.

    Counts stand on the host for backends that plan there, and on the device for those whose kernels read them.
    """

    block_table: Int32Array
    """[R, columns] block ids by position; 0, the null block, outside a window."""
    query_lens: Int32Array
    """[R] query tokens of each row, ≥ 1."""
    context_lens: Int32Array
    """[R] tokens of each row that the cache held before."""
    num_decodes: int
    """The first so many rows have one query token."""
    block_size: int
    window: int | None
    """Tokens that a query sees, its own counted; None: all."""
    device_table: torch.Tensor
    """[R, columns] int32; columns may be further apart than they are wide."""
    query_starts: torch.Tensor
    """[R + 1] int32: where each row's queries begin among the T, and T."""
    seq_lens: torch.Tensor
    """[R] int32: tokens of each row after the step, context and queries."""
    write_indices: torch.Tensor
    """[T] int64: flat page index (block · block_size + offset) of each query token."""

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.seq_lens.device


class GroupStep(Protocol):
    """What one layer group of a step knows: where to write, and how its backend reads."""

    @property
    def write_indices(self) -> torch.Tensor:
        """[T] flat page index (block · block_size + offset) of each query token."""

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Outputs [T, heads, head_dim] in the query's dtype."""


class AttentionBackend(Protocol):
    """One way to attend over the cache; made once, asked once for each step and layer group."""

    @property
    def name(self) -> str:
        """As ATTENTION names it."""

    @property
    def reads_whole_blocks(self) -> bool:
        """Whether pages that a row never wrote enter its sums, masked, so that they must hold numbers."""

    @property
    def plans_on_device(self) -> bool:
        """Whether a step of decoding rows is planned from the device's tensors alone, so that it can be captured."""

    def plan_group(self, inputs: GroupInputs) -> GroupStep:
        """What all layers of the group share in this step."""


@dataclass(frozen=True, slots=True)
class PagedStep:
    """The paged metadata of one step, shared by all layers."""

    groups: tuple[GroupStep, ...]
    places: tuple[tuple[int, int], ...]
    """By layer: its group and its place in the group."""
    keys: Sequence[torch.Tensor]
    """By place in a group: [blocks, block_size, kv_heads, head_dim]."""
    values: Sequence[torch.Tensor]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    paged: PagedStep | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim].

    Returns [1, T, heads, head_dim]. The window comes from the layer's group, so ``sliding_window`` is not read.
    Raises UnsupportedModelError for what would change the scores and is not known here.
    """
    del attention_mask, dropout, sliding_window
    if paged is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass keyword arguments on to attention: the paged cache can't reach it"
        )
    _refuse_unknown(module, kwargs, is_causal)
    group_index, place = paged.places[module.layer_idx]  # type: ignore[index]
    group = paged.groups[group_index]
    keys, values = paged.keys[place], paged.values[place]
    store(keys, key[0].transpose(0, 1), group.write_indices)
    store(values, value[0].transpose(0, 1), group.write_indices)
    call = LayerCall(
        query=query[0].transpose(0, 1),
        keys=keys,
        values=values,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
    )
    return group.attend(call).unsqueeze(0), None


def store(pages: torch.Tensor, new: torch.Tensor, indices: torch.Tensor) -> None:
    """Write ``new`` [T, kv_heads, head_dim] to the flat page ``indices`` [T] of ``pages``; eight bits saturate."""
    flat = pages.view(-1, *pages.shape[2:])
    stored = narrow(new) if pages.dtype is FLOAT8 else new.to(pages.dtype)
    as_bytes(flat).index_copy_(0, indices, as_bytes(stored))


def register() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any], is_causal: bool | None) -> None:
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to attention, which the paged cache "
            "does not support"
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} is not causal: only causal language models are served")
