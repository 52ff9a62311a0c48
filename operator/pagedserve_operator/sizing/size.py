"""How many blocks and batch tokens a GPU holds beside the model's weights: a pure function, its reasons as data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.errors import ModelDoesNotFit, TuningError
from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.shapes.model import FROM_NAME, ModelShape
from pagedserve_operator.sizing.blocks import SHORTEST_SEQUENCE, UNBOUNDED
from pagedserve_operator.sizing.cures import too_large, too_long
from pagedserve_operator.sizing.demand import (
    CACHE_BYTES,
    DEFAULT_NUM_SEQS,
    DTYPE_BYTES,
    FIRST_WITH_FLOAT8,
    LARGEST_BATCH,
    MIB,
    QUANTIZATIONS,
    SMALLEST_BATCH,
    Demand,
)
from pagedserve_operator.spec import Model, TuningOverrides

FLOPS_REACHED: Final = 0.45
"""Of the datasheet's, in a step's matrix products."""
STEP_SECONDS: Final = 0.25
"""What a full step may take: running streams wait so long for their next token."""
FIRST_WITH_BFLOAT16: Final = (8, 0)


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


def size(
    shape: ModelShape,
    gpu: ResolvedGpu,
    model: Model,
    overrides: TuningOverrides,
    *,
    max_num_seqs: int | None = None,
) -> Sizing:
    """The numbers for this model on this GPU; what the user gives wins.

    Raises ModelDoesNotFit with the shortfall and the cheapest cure, and TuningError for a dtype or a length that can't
    be.
    """
    if not shape.layers_per_group:
        raise TuningError(
            "spec.model.architecture.layers and layerTypes give no layers: state at least one, full or sliding"
        )
    dtype = _dtype("spec.model.dtype", model.dtype, gpu)
    demand = Demand(
        shape=shape,
        gpu=gpu,
        overrides=overrides,
        dtype=dtype,
        kv_cache_dtype=_cache_dtype(overrides.kv_cache_dtype, gpu, auto=dtype),
        quantization=_quantization(model.quantization, gpu),
        max_num_seqs=max_num_seqs or DEFAULT_NUM_SEQS,
        use_cuda_graph=uses_graphs(gpu, overrides),
    )
    _check_length(shape, model.max_model_len)
    if demand.shortage(SHORTEST_SEQUENCE) > 0:
        raise ModelDoesNotFit(too_large(demand))
    batch, fitting = _fit(demand, model.max_model_len)
    _check_blocks(demand, batch)
    length = _length(demand, model.max_model_len, batch, fitting)
    return Sizing(
        dtype=dtype,
        kv_cache_dtype=demand.kv_cache_dtype,
        num_blocks=overrides.num_blocks or fitting,
        max_batch_tokens=overrides.max_batch_tokens or batch,
        max_model_len=length,
        block_size=overrides.block_size,
        block_bytes=demand.blocks.block_bytes,
        breakdown=_breakdown(demand, batch, min(fitting, overrides.num_blocks or fitting)),
        notes=_notes(demand, model, batch=batch, fitting=fitting, length=length),
    )


def uses_graphs(gpu: ResolvedGpu, overrides: TuningOverrides) -> bool:
    """Whether the engine captures CUDA graphs: on GPUs, unless the user says otherwise."""
    return not gpu.is_cpu and overrides.use_cuda_graph is not False


def batch_for(gpu: ResolvedGpu, shape: ModelShape) -> int:
    """Query tokens of a step that takes about a quarter of a second: the nearest power of two, within bounds."""
    flops = gpu.count * gpu.tflops * 1e12 * FLOPS_REACHED
    tokens = flops * STEP_SECONDS / (2 * shape.active_parameters)
    exponent = round(math.log2(tokens)) if tokens > 1 else 0
    return int(min(LARGEST_BATCH, max(SMALLEST_BATCH, 2.0**exponent)))


def _cache_dtype(wanted: str, gpu: ResolvedGpu, *, auto: str) -> str:
    field = "spec.tuning.kvCacheDtype"
    return wanted if wanted == "fp8" else _dtype(field, wanted, gpu, auto=auto, known=tuple(CACHE_BYTES))


def _quantization(wanted: str, gpu: ResolvedGpu) -> str:
    if wanted not in QUANTIZATIONS:
        raise TuningError(f"spec.model.quantization is {wanted}: set it to {', '.join(QUANTIZATIONS)}")
    if wanted == "fp8" and not gpu.is_cpu and gpu.compute_capability < FIRST_WITH_BFLOAT16:
        major, minor = gpu.compute_capability
        raise TuningError(
            f"spec.model.quantization is fp8, and {gpu.product} (compute capability {major}.{minor}) is too old for "
            "it: set it to int8, or spec.gpu.type to a card of 8.9 or later"
        )
    return wanted


def _dtype(
    field: str, wanted: str, gpu: ResolvedGpu, *, auto: str | None = None, known: tuple[str, ...] = tuple(DTYPE_BYTES)
) -> str:
    has_bfloat16 = gpu.is_cpu or gpu.compute_capability >= FIRST_WITH_BFLOAT16
    if wanted == "auto":
        return auto or ("float32" if gpu.is_cpu else "bfloat16" if has_bfloat16 else "float16")
    if wanted not in DTYPE_BYTES:
        raise TuningError(f"{field} is {wanted}: set it to auto, {', '.join(known)}")
    if wanted == "bfloat16" and not has_bfloat16:
        major, minor = gpu.compute_capability
        raise TuningError(
            f"{field} is bfloat16, which {gpu.product} (compute capability {major}.{minor}) hasn't: "
            "set it to auto or float16, or spec.gpu.type to a card of 8.0 or later"
        )
    return wanted


def _check_length(shape: ModelShape, wanted: int | None) -> None:
    longest = shape.max_position_embeddings
    # A guessed shape is no reason to refuse.
    if wanted is not None and longest is not None and wanted > longest and shape.source != FROM_NAME:
        raise TuningError(f"spec.model.maxModelLen is {wanted} and the model holds {longest} tokens: set at most that")


def _check_blocks(demand: Demand, batch: int) -> None:
    given, smallest = demand.overrides.num_blocks, demand.blocks.smallest(batch)
    if given is not None and given < smallest:
        raise TuningError(
            f"spec.tuning.numBlocks is {given}: the shortest sequence takes {smallest}; set at least that"
        )


def _fit(demand: Demand, wanted: int | None) -> tuple[int, int]:
    """(Batch tokens, blocks) that fit: where room is short, the batch gives way before the blocks do."""
    blocks, longest = demand.blocks, demand.shape.max_position_embeddings or UNBOUNDED
    batch = demand.overrides.max_batch_tokens or batch_for(demand.gpu, demand.shape)
    lowest, cap = min(SMALLEST_BATCH, batch), None
    while batch > lowest:
        # Without a given length a step shouldn't be larger than the prompt that the cache can take.
        needed = blocks.needed(wanted or min(batch, longest), batch)
        if demand.room(batch) >= needed * blocks.block_bytes:
            break
        # What the smaller batch frees isn't given to more blocks than the larger one wanted: a little more memory
        # would then mean fewer of them.
        batch, cap = max(lowest, batch // 2), needed
    fitting = demand.room(batch) // blocks.block_bytes
    limits = [limit for limit in (cap, demand.cache_limit(wanted, batch)) if limit is not None]
    return batch, max(blocks.smallest(batch), min([fitting, *limits]))


def _length(demand: Demand, wanted: int | None, batch: int, fitting: int) -> int:
    given = demand.overrides.num_blocks
    pool = fitting if given is None else min(given, fitting)
    longest = demand.blocks.longest(pool, batch)
    if wanted is None:
        return max(SHORTEST_SEQUENCE, min(demand.shape.max_position_embeddings or UNBOUNDED, longest))
    if wanted <= longest:
        return wanted
    needed = demand.blocks.needed(wanted, batch)
    if pool == given:
        raise ModelDoesNotFit(
            f"spec.model.maxModelLen is {wanted}: one such sequence takes {needed} blocks and spec.tuning.numBlocks is "
            f"{given}: raise it to {needed}, leave it out, or set maxModelLen to at most {longest}"
        )
    raise ModelDoesNotFit(too_long(demand, wanted, batch=batch, fitting=fitting, longest=longest))


def _breakdown(demand: Demand, batch: int, num_blocks: int) -> Breakdown:
    parts = {
        "weights": demand.weights // MIB,
        "runtime": demand.runtime // MIB,
        "activations": demand.activations(batch) // MIB,
        "graphs": demand.graphs // MIB,
        "cache": num_blocks * demand.blocks.block_bytes // MIB,
    }
    total = demand.gpu.memory_mib
    return Breakdown(**parts, left_over=total - sum(parts.values()), total=total)


def _notes(demand: Demand, model: Model, *, batch: int, fitting: int, length: int) -> tuple[str, ...]:
    notes = list(demand.gpu.notes)
    overrides, shape = demand.overrides, demand.shape
    if shape.source == FROM_NAME:
        notes.append(
            f"the model's shape is guessed from its name ({shape.parameters / 1e9:.3g} billion parameters); "
            "spec.model.architecture states it"
        )
    if shape.kv_heads % demand.gpu.count and demand.gpu.count % shape.kv_heads:
        notes.append(f"spec.gpu.count {demand.gpu.count} doesn't divide the model's {shape.kv_heads} key-value heads")
    if model.dtype == "auto" and demand.dtype == "float16":
        notes.append(f"{demand.gpu.product} has no bfloat16: the model runs in float16")
    notes.extend(_quantization_notes(demand))
    if overrides.max_batch_tokens and batch < overrides.max_batch_tokens:
        notes.append(
            f"spec.tuning.maxBatchTokens {overrides.max_batch_tokens} leaves too little memory for the cache; "
            f"the engine will lower it to about {batch}"
        )
    elif not overrides.max_batch_tokens and batch < (wished := batch_for(demand.gpu, shape)):
        notes.append(f"maxBatchTokens is {batch} rather than {wished}, to leave memory for the cache")
    if overrides.num_blocks and overrides.num_blocks > fitting:
        notes.append(
            f"spec.tuning.numBlocks {overrides.num_blocks} is more than fits; "
            f"the engine will lower it to about {fitting}"
        )
    if model.max_model_len is None and length < (shape.max_position_embeddings or 0):
        notes.append(f"maxModelLen is {length} of the model's {shape.max_position_embeddings}: the cache holds no more")
    return tuple(notes)


def _quantization_notes(demand: Demand) -> Iterator[str]:
    gpu, quantization = demand.gpu, demand.quantization
    if quantization == "fp8" and gpu.is_cpu:
        yield "a CPU only emulates fp8, slowly: spec.model.quantization int8 is faster"
    elif quantization == "fp8" and gpu.compute_capability < FIRST_WITH_FLOAT8:
        yield f"{gpu.product} multiplies no fp8, which saves memory alone: spec.model.quantization int8 is faster"
    if quantization != "none" and 2 * demand.shape.wide_parameters > demand.shape.parameters:
        share = demand.shape.wide_parameters / demand.shape.parameters
        yield f"spec.model.quantization leaves {share:.0%} of the model as it is: embeddings, output layer, experts"
