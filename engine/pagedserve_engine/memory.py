"""The memory plan: what weights, a step and the cache take, and what is lowered where that is too much.

Planning is a pure function of measured numbers, so that ``plan-memory`` prints what the server would do. Given numbers
are only ever lowered: first the batch, then the blocks; what can't be lowered is an error that says what would fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal

import torch

from pagedserve_engine.cache.layout import UNBOUNDED, CacheLayout
from pagedserve_engine.errors import ConfigError, MemoryPlanError
from pagedserve_engine.limits import Memory, cpu_limit, host_memory

__all__ = [
    "Memory",
    "MemoryInputs",
    "MemoryPlan",
    "available_memory",
    "cpu_limit",
    "estimate_memory",
    "format_bytes",
    "plan_memory",
    "render_table",
    "to_json",
]

Auto = Literal["auto"]

AUTO_BATCH_TOKENS: Final = 2048
SMALLEST_BATCH_TOKENS: Final = 512
"""Tokens: a batch isn't lowered below this to make room for blocks, unless it was given smaller."""
SHORTEST_SEQUENCE: Final = 2
"""Tokens: one of prompt and one of output."""


def available_memory(device: torch.device | str) -> Memory:
    """The device's memory in bytes; on a CPU what the container may use.

    Raises ConfigError for a device that is neither a CPU nor CUDA.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return host_memory()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(free=free, total=total)
    raise ConfigError(f"DEVICE is {device}: memory can be planned on cpu and cuda", param="device")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInputs:
    """What the plan is made of; bytes unless said otherwise."""

    total: int
    free: int | None = None
    """Free before the engine took anything; None: all."""
    max_memory_percent: float
    """Share (0 to 1) of the total that the engine may take."""
    weights: int
    weights_kind: str = ""
    """What they are held in, to print."""
    cache_kind: str = ""
    activation_bytes_per_token: float
    """Of the most that a step takes at once, the part that grows with its query tokens."""
    activation_fixed: int = 0
    """The part that doesn't."""
    static_buffers: int = 0
    graphs: int = 0
    layout: CacheLayout
    num_blocks: int | Auto
    max_batch_tokens: int | Auto
    max_model_len: int | Auto
    model_max_len: int
    """Tokens that the model itself can hold."""
    max_num_seqs: int
    device_type: str = "cpu"

    @property
    def budget(self) -> int:
        """What the engine may take."""
        share = int(self.total * self.max_memory_percent)
        return share if self.free is None else min(share, self.free)

    def activations(self, batch_tokens: int) -> int:
        """What a step of ``batch_tokens`` query tokens takes at most."""
        return self.activation_fixed + round(self.activation_bytes_per_token * batch_tokens)

    def room(self, batch_tokens: int) -> int:
        """What such steps leave for the cache; negative where they don't even fit."""
        return self.budget - self.weights - self.static_buffers - self.graphs - self.activations(batch_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the engine takes, in bytes, and the settings that were asked for and that it runs with."""

    total: int
    budget: int
    weights: int
    weights_kind: str = ""
    cache_kind: str = ""
    activations: int
    static_buffers: int
    graphs: int
    cache: int
    block_size: int
    block_bytes: int
    requested_num_blocks: int | Auto
    num_blocks: int
    requested_max_batch_tokens: int | Auto
    max_batch_tokens: int
    requested_max_model_len: int | Auto
    max_model_len: int
    longest_sequence: int | None
    """Tokens that the blocks hold of one sequence alone; None: the windows bound it, not memory."""

    @property
    def used(self) -> int:
        """All parts together."""
        return self.weights + self.activations + self.static_buffers + self.graphs + self.cache

    @property
    def settings(self) -> tuple[tuple[str, int | Auto, int], ...]:
        """(variable, requested, actual) of what the plan decides."""
        return (
            ("NUM_BLOCKS", self.requested_num_blocks, self.num_blocks),
            ("MAX_BATCH_TOKENS", self.requested_max_batch_tokens, self.max_batch_tokens),
            ("MAX_MODEL_LEN", self.requested_max_model_len, self.max_model_len),
        )

    @property
    def lowered(self) -> tuple[str, ...]:
        """A phrase for each given number that didn't fit: "NUM_BLOCKS from 4096 to 1024"."""
        return tuple(
            f"{name} from {requested} to {actual}"
            for name, requested, actual in self.settings
            if requested not in ("auto", actual)
        )


def plan_memory(inputs: MemoryInputs) -> MemoryPlan:
    """Batch, blocks and length that fit into the budget.

    Raises MemoryPlanError where the weights, the smallest cache or an explicit MAX_MODEL_LEN don't fit, and ConfigError
    where MAX_MODEL_LEN is beyond the model.
    """
    _check_weights(inputs)
    batch = _choose_batch(inputs)
    num_blocks = _choose_blocks(inputs, batch)
    longest = inputs.layout.largest_length(num_blocks, batch)
    return MemoryPlan(
        total=inputs.total,
        budget=inputs.budget,
        weights=inputs.weights,
        weights_kind=inputs.weights_kind,
        cache_kind=inputs.cache_kind,
        activations=inputs.activations(batch),
        static_buffers=inputs.static_buffers,
        graphs=inputs.graphs,
        cache=num_blocks * inputs.layout.block_bytes,
        block_size=inputs.layout.block_size,
        block_bytes=inputs.layout.block_bytes,
        requested_num_blocks=inputs.num_blocks,
        num_blocks=num_blocks,
        requested_max_batch_tokens=inputs.max_batch_tokens,
        max_batch_tokens=batch,
        requested_max_model_len=inputs.max_model_len,
        max_model_len=_choose_length(inputs, batch, num_blocks),
        longest_sequence=None if longest == UNBOUNDED else longest,
    )


def estimate_memory(
    layout: CacheLayout,
    *,
    cache_tokens: int,
    batch_tokens: int,
    hidden_size: int,
    vocab_size: int,
    num_masks: int = 0,
) -> int:
    """Bytes that transformers' formula gives cache and step together, to print beside what was measured.

    ``num_masks`` is how many attention masks over batch and cache are made in full; paged attention makes none.
    """
    groups = len(layout.groups)
    masks = batch_tokens * cache_tokens * num_masks * 2
    cache = 2 * cache_tokens * (layout.layers_per_group * layout.page_bytes + 2 * groups)
    return masks + cache + batch_tokens * ((hidden_size + vocab_size) * 2 + 28 + 4 * groups)


def format_bytes(count: int) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{count / (1 << 30):.2f} GiB" if abs(count) >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def render_table(plan: MemoryPlan, *, estimate: int | None = None) -> str:
    """The plan as aligned text; ``estimate`` is the formula's bytes for activations and cache together."""
    parts = [
        (_labelled("weights", plan.weights_kind), plan.weights),
        (f"activations of {plan.max_batch_tokens} tokens", plan.activations),
        ("static buffers", plan.static_buffers),
        ("graphs", plan.graphs),
        (_labelled(f"cache: {plan.num_blocks} blocks of {plan.block_size} tokens", plan.cache_kind), plan.cache),
        ("not used", plan.budget - plan.used),
        ("budget", plan.budget),
        ("device", plan.total),
    ]
    if estimate is not None:
        parts.append(("formula for activations and cache", estimate))
    sizes = [(name, format_bytes(size), f"{100 * size / plan.total:.1f} %") for name, size in parts]
    settings = [(name, str(requested), str(actual)) for name, requested, actual in plan.settings]
    rows = [("memory", "size", "share"), *sizes, ("", "", ""), ("setting", "requested", "actual"), *settings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (f"{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}" for name, left, right in rows)
    return "\n".join(line.rstrip() for line in lines)


def _labelled(name: str, kind: str) -> str:
    return f"{name}, {kind}" if kind else name


def to_json(plan: MemoryPlan, *, estimate: int | None = None) -> str:
    """The plan as a JSON object: bytes by part, and each setting as requested and actual."""
    parts = ("total", "budget", "weights", "activations", "static_buffers", "graphs", "cache", "used")
    document = {
        "bytes": {part: getattr(plan, part) for part in parts},
        "kinds": {"weights": plan.weights_kind, "cache": plan.cache_kind},
        "block": {"tokens": plan.block_size, "bytes": plan.block_bytes},
        "settings": {
            name.lower(): {"requested": requested, "actual": actual} for name, requested, actual in plan.settings
        },
        "longest_sequence": plan.longest_sequence,
        "formula_bytes": estimate,
    }
    return json.dumps(document, indent=2)


def _check_weights(inputs: MemoryInputs) -> None:
    if inputs.weights <= inputs.budget:
        return
    raise MemoryPlanError(
        f"the weights take {format_bytes(inputs.weights)} and the engine may use {format_bytes(inputs.budget)} of "
        f"{format_bytes(inputs.total)}: {format_bytes(inputs.weights - inputs.budget)} short; choose a smaller model "
        "or DTYPE, set QUANTIZATION to fp8 or int8, raise MAX_MEMORY_PERCENT, or give it more memory",
        param="model",
    )


def _choose_batch(inputs: MemoryInputs) -> int:
    """The given batch, halved while it leaves too little for the blocks."""
    batch = AUTO_BATCH_TOKENS if inputs.max_batch_tokens == "auto" else inputs.max_batch_tokens
    smallest = min(SMALLEST_BATCH_TOKENS, batch)
    while batch > smallest and inputs.room(batch) < _wanted_blocks(inputs, batch) * inputs.layout.block_bytes:
        batch = max(smallest, batch // 2)
    return batch


def _wanted_blocks(inputs: MemoryInputs, batch: int) -> int:
    """Blocks for which the batch gives way: those given, or what one sequence needs."""
    if inputs.num_blocks != "auto":
        return inputs.num_blocks
    # Where no length is given, a batch shouldn't be larger than what the cache can take of one prompt.
    length = min(batch, inputs.model_max_len) if inputs.max_model_len == "auto" else inputs.max_model_len
    return 1 + inputs.layout.blocks_for(length, batch)


def _choose_blocks(inputs: MemoryInputs, batch: int) -> int:
    room, layout = inputs.room(batch), inputs.layout
    num_blocks = max(0, room // layout.block_bytes)
    if inputs.num_blocks != "auto":
        num_blocks = min(num_blocks, inputs.num_blocks)
    elif inputs.device_type == "cpu":
        # Other processes share a CPU's memory: no more than what can ever be in use.
        length = inputs.model_max_len if inputs.max_model_len == "auto" else inputs.max_model_len
        num_blocks = min(num_blocks, 1 + inputs.max_num_seqs * layout.blocks_for(length, batch))
    smallest = 1 + layout.blocks_for(SHORTEST_SEQUENCE, batch)
    if num_blocks >= smallest:
        return num_blocks
    if num_blocks == inputs.num_blocks:
        raise MemoryPlanError(
            f"NUM_BLOCKS is {num_blocks}: the shortest sequence takes one block in each of {len(layout.groups)} layer "
            f"groups beside the null block; give at least {smallest}",
            param="num_blocks",
        )
    raise MemoryPlanError(
        f"weights and steps of {batch} tokens leave {format_bytes(room)} of the {format_bytes(inputs.budget)} that the "
        f"engine may use, and the smallest cache takes {format_bytes(smallest * layout.block_bytes)}: lower "
        "MAX_BATCH_TOKENS or MAX_NUM_SEQS, raise MAX_MEMORY_PERCENT, or give it more memory",
        param="max_batch_tokens",
    )


def _choose_length(inputs: MemoryInputs, batch: int, num_blocks: int) -> int:
    layout, wanted = inputs.layout, inputs.max_model_len
    longest = min(inputs.model_max_len, layout.largest_length(num_blocks, batch))
    if wanted == "auto":
        return longest
    if wanted > inputs.model_max_len:
        raise ConfigError(
            f"MAX_MODEL_LEN is {wanted} and the model holds {inputs.model_max_len} tokens: give at most that",
            param="max_model_len",
        )
    if wanted <= longest:
        return wanted
    needed = 1 + layout.blocks_for(wanted, batch)
    short = needed - num_blocks
    cure = (
        f"raise NUM_BLOCKS to {needed}"
        if num_blocks == inputs.num_blocks
        else "raise MAX_MEMORY_PERCENT or give it more memory"
    )
    raise MemoryPlanError(
        f"MAX_MODEL_LEN is {wanted}: one sequence of that length takes {needed} blocks and there are {num_blocks}, "
        f"{short} blocks ({format_bytes(short * layout.block_bytes)}) short; {longest} tokens fit: set MAX_MODEL_LEN "
        f"to at most {longest}, or {cure}",
        param="max_model_len",
    )
