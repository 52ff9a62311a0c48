"""What to say when a model doesn't fit: how much is missing, and the cheapest change that is known to help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from pagedserve_operator.gpus.catalogue import CATALOGUE
from pagedserve_operator.sizing.blocks import SHORTEST_SEQUENCE
from pagedserve_operator.sizing.demand import CACHE_BYTES, DTYPE_BYTES, FIRST_WITH_FLOAT8, GIB, MIB, Demand

_COUNTS: Final = (2, 4, 8)
"""GPUs of one node."""
_OLDEST: Final = (8, 0)
"""Compute capability of a card that is worth naming: anything older is smaller than its successors."""


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def too_large(demand: Demand) -> str:
    """The message for weights that leave no room for the shortest sequence."""
    short = demand.shortage(SHORTEST_SEQUENCE)
    per_device = f" on each of {demand.gpu.count} devices" if demand.gpu.count > 1 else ""
    return (
        f"the model doesn't fit: {gib(demand.weights)} of weights in {_kind(demand)}{per_device} and what steps take "
        f"beside them need {gib(demand.budget + short)}, and spec.tuning.maxMemoryPercent "
        f"{demand.overrides.max_memory_percent:g} allows {gib(demand.budget)} of {demand.gpu.product}'s "
        f"{gib(demand.gpu.memory_mib * MIB)}: {gib(short)} short; {cheapest(demand, SHORTEST_SEQUENCE)}"
    )


def too_long(demand: Demand, wanted: int, *, batch: int, fitting: int, longest: int) -> str:
    """The message for an explicit length that is beyond the blocks that fit."""
    short = (demand.blocks.needed(wanted, batch) - fitting) * demand.blocks.block_bytes
    return (
        f"spec.model.maxModelLen is {wanted}, and one sequence of that length needs {gib(short)} more than is left on "
        f"{demand.gpu.product}: set it to at most {longest}, or {cheapest(demand, wanted)}"
    )


def cheapest(demand: Demand, length: int) -> str:
    """What to set so that a sequence of ``length`` tokens fits: a smaller dtype, more memory, or the least card."""
    if demand.dtype == "float32" and not demand.gpu.is_cpu and _fits(half := _in_half(demand), length):
        return f"set spec.model.dtype to {half.dtype}"
    if demand.gpu.is_cpu:
        needed = -(-(demand.budget + demand.shortage(length)) // int(GIB * demand.overrides.max_memory_percent))
        return f"set spec.resources.limits.memory to {max(needed, demand.gpu.memory_mib * MIB // GIB + 1)}Gi or more"
    cures = [*_more_devices(demand, length), *_larger_card(demand, length), *_smaller_weights(demand, length)]
    return f"set {' or '.join(cures)}" if cures else "no GPU in the catalogue holds it: choose a smaller model"


def _in_half(demand: Demand) -> Demand:
    dtype = "bfloat16" if demand.gpu.compute_capability >= _OLDEST else "float16"
    smaller_cache = (
        DTYPE_BYTES[dtype] < CACHE_BYTES[demand.kv_cache_dtype] and demand.overrides.kv_cache_dtype == "auto"
    )
    return replace(demand, dtype=dtype, kv_cache_dtype=dtype if smaller_cache else demand.kv_cache_dtype)


def _kind(demand: Demand) -> str:
    return demand.dtype if demand.quantization == "none" else f"{demand.quantization} and {demand.dtype}"


def _smaller_weights(demand: Demand, length: int) -> Iterator[str]:
    kind = "fp8" if demand.gpu.compute_capability >= FIRST_WITH_FLOAT8 else "int8"
    if demand.quantization == "none" and _fits(replace(demand, quantization=kind), length):
        yield f"spec.model.quantization to {kind}"


def _fits(demand: Demand, length: int) -> bool:
    return demand.shortage(length) <= 0


def _more_devices(demand: Demand, length: int) -> Iterator[str]:
    if not demand.gpu.is_whole:
        return
    for count in _COUNTS:
        if count > demand.gpu.count and _fits(replace(demand, gpu=replace(demand.gpu, count=count)), length):
            yield f"spec.gpu.count to {count}"
            return


def _larger_card(demand: Demand, length: int) -> Iterator[str]:
    """The card with the least memory, then the slowest, that holds it in as many devices."""
    cards = sorted(CATALOGUE.values(), key=lambda card: (card.memory_mib, card.tflops))
    for card in cards:
        gpu = replace(demand.gpu, product=card.product, memory_mib=card.memory_mib)
        if card.compute_capability >= _OLDEST and _fits(replace(demand, gpu=gpu), length):
            yield f"spec.gpu.type to {card.product} ({card.memory_mib / 1024:.1f} GiB)"
            return
