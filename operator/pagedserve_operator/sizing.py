"""How many blocks and batch tokens a GPU holds beside the model's weights: a pure function, its reasons as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What takes the memory of one device, in MiB; the parts add up to ``total``."""

    weights: int
    runtime: int
    activations: int
    graphs: int
    cache: int
    left_over: int
    """Beyond ``maxMemoryPercent``, and what fills no whole block."""
    total: int
    """The device's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The engine's numbers for one model on one kind of GPU."""

    dtype: str
    """Of the weights: bfloat16, float16 or float32, never auto."""
    kv_cache_dtype: str
    """Of the cache, never auto."""
    num_blocks: int
    max_batch_tokens: int
    """Query tokens of one step."""
    max_model_len: int
    """Tokens of prompt and output together."""
    block_size: int
    """Tokens of a block."""
    block_bytes: int
    """Of one block on one device."""
    breakdown: Breakdown
    notes: tuple[str, ...]
    """What the user should know: lowered, guessed or shortened numbers, a sentence each."""
