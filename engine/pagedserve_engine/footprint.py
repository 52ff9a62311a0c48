"""What a model, a step and its captured graphs take of a device's memory: measured on a GPU, bounded on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagedserve_engine.attention.interface import AttentionBackend
from pagedserve_engine.building import build_runner, wants_graphs
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.tensors import CacheTensors, choose_cache_dtype
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.graphs import CudaRecorder, graph_sizes
from pagedserve_engine.memory import Memory, MemoryInputs, MemoryPlan, estimate_memory, plan_memory
from pagedserve_engine.model.loader import LoadedModel
from pagedserve_engine.model.quantization import scratch_bytes
from pagedserve_engine.model.shards import Share
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.ranks import ALONE, Rank
from pagedserve_engine.runner import ModelRunner
from pagedserve_engine.scheduler.budget import PROMPT_LOGITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that steps take."""

    activation_fixed: int
    """Of the most that a step takes at once, the part that doesn't grow with its query tokens."""
    activation_bytes_per_token: float
    """The part that does."""
    static_buffers: int = 0
    graphs: int = 0


def plan_core(
    config: EngineConfig,
    loaded: LoadedModel,
    device: torch.device,
    attention: AttentionBackend,
    *,
    before: Memory,
    rank: Rank = ALONE,
) -> tuple[MemoryPlan, CacheLayout, torch.dtype]:
    """The memory plan for a loaded model, its cache layout and the cache's dtype. ``before``: free before loading.

    Ranks plan for the least of them all, so that all have the same plan.
    """
    spec, share = loaded.spec, Share.of(loaded.spec, rank.index, rank.world)
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, loaded.dtype)
    layout = CacheLayout.build(
        spec.layer_types,
        window=spec.sliding_window,
        num_kv_heads=share.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=config.block_size,
        dtype_bytes=cache_dtype.itemsize,
    )
    if device.type == "cuda":
        found = measure_footprint(config, loaded, attention, CacheTensors(layout, 1, cache_dtype, device), layout)
    else:
        found = estimate_footprint(part_of(spec, share), config.max_num_seqs, scratch=scratch_bytes(loaded.model))
    inputs = MemoryInputs(
        total=before.total,
        free=before.free,
        max_memory_percent=config.max_memory_percent,
        weights=loaded.weights_bytes,
        weights_kind="" if config.quantization == "none" else f"linear layers in {config.quantization}",
        cache_kind="" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        activation_bytes_per_token=found.activation_bytes_per_token,
        activation_fixed=found.activation_fixed,
        static_buffers=found.static_buffers,
        graphs=found.graphs,
        layout=layout,
        num_blocks=config.num_blocks,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=config.max_model_len,
        model_max_len=spec.max_position_embeddings,
        max_num_seqs=config.max_num_seqs,
        device_type=device.type,
    )
    return plan_memory(worst(rank.exchange(inputs))), layout, cache_dtype


def part_of(spec: ModelSpec, share: Share) -> ModelSpec:
    """The shape of what one rank computes; it sees the logits of the whole vocabulary."""
    return dataclasses.replace(
        spec,
        num_heads=share.num_heads,
        num_kv_heads=share.num_kv_heads,
        intermediate_size=share.intermediate_size,
    )


def worst(inputs: Sequence[MemoryInputs]) -> MemoryInputs:
    """What every rank can count on, of what each measured; on a CPU the ranks share one memory, of which each has told
    its part."""
    first = inputs[0]
    free = [each.free for each in inputs if each.free is not None]
    return dataclasses.replace(
        first,
        total=min(each.total for each in inputs),
        free=min(free) if first.device_type == "cuda" and free else first.free,
        weights=max(each.weights for each in inputs),
        activation_bytes_per_token=max(each.activation_bytes_per_token for each in inputs),
        activation_fixed=max(each.activation_fixed for each in inputs),
        static_buffers=max(each.static_buffers for each in inputs),
        graphs=max(each.graphs for each in inputs),
    )


def estimate_footprint(spec: ModelSpec, max_num_seqs: int, *, scratch: int = 0) -> Footprint:
    """Of steps on a CPU, in float32: an upper bound read off the forward pass.

    Fixed: logits of every row in three copies while sampling, and one row's keys and values gathered. By token: the
    residual stream and its norms, queries, keys and values, both halves of the gated product. One layer at a time
    takes ``scratch`` bytes besides.
    """
    logits = 3 * (max_num_seqs + PROMPT_LOGITS) * spec.vocab_size
    gathered = 4 * spec.num_kv_heads * spec.head_dim * spec.max_position_embeddings
    stream = 8 * spec.hidden_size + 3 * spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)
    return Footprint(
        activation_fixed=4 * (logits + gathered) + scratch,
        activation_bytes_per_token=4.0 * (stream + 4 * spec.intermediate_size),
    )


def measure_footprint(
    config: EngineConfig, loaded: LoadedModel, attention: AttentionBackend, cache: CacheTensors, layout: CacheLayout
) -> Footprint:
    """Of steps on a CUDA device: the peaks of two worst-case steps over the smallest ``cache``, and a few captures."""
    device = cache.keys[0].device
    large = 2048 if config.max_batch_tokens == "auto" else config.max_batch_tokens
    longest = loaded.spec.max_position_embeddings if config.max_model_len == "auto" else config.max_model_len
    resting = torch.cuda.memory_allocated(device)
    runner = build_runner(
        config, loaded, cache, attention, layout=layout, max_batch_tokens=large, max_model_len=longest
    )
    static_buffers = torch.cuda.memory_allocated(device) - resting
    small = max(1, large // 2)
    peaks = [_peak(runner, tokens, config.max_num_seqs, device) for tokens in (small, large)]
    per_token = max(0.0, (peaks[1] - peaks[0]) / max(1, large - small))
    return Footprint(
        activation_fixed=max(0, int(peaks[1] - per_token * large)),
        activation_bytes_per_token=per_token,
        static_buffers=static_buffers,
        graphs=measure_graphs(config, runner),
    )


def _peak(runner: ModelRunner, tokens: int, max_num_seqs: int, device: torch.device) -> int:
    """Bytes that a step of ``tokens`` query tokens takes at once."""
    # The first run is for what libraries and compilers keep.
    runner.warm_up(tokens, max_num_seqs)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    runner.warm_up(tokens, max_num_seqs)
    return torch.cuda.max_memory_allocated(device) - resting


def measure_graphs(config: EngineConfig, runner: ModelRunner) -> int:
    """Bytes that all captured steps will take: the largest, and for each of the others what the second adds to it."""
    if not wants_graphs(config, runner):
        return 0
    sizes = graph_sizes(config.max_num_seqs)
    taken: list[int] = []
    for measured in (sizes[-1:], sizes[-2:]):
        runner.capture(CudaRecorder(runner.device), measured)
        if runner.graphs is None:
            return 0
        taken.append(runner.graphs.num_bytes)
        runner.release_graphs()
    first, both = taken
    return first + max(0, both - first) * (len(sizes) - 1)


def formula_bytes(plan: MemoryPlan, spec: ModelSpec, layout: CacheLayout) -> int:
    """What transformers' formula gives for cache and step, to stand beside the plan."""
    return estimate_memory(
        layout,
        cache_tokens=plan.num_blocks * plan.block_size,
        batch_tokens=plan.max_batch_tokens,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
    )
