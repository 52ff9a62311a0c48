"""Puts the core together: device, model, memory plan, cache, runner, scheduler, processor."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from pagedserve_engine.attention.backends import choose_backend
from pagedserve_engine.attention.interface import ATTENTION_NAME, register
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.cache.tensors import CacheTensors, choose_cache_dtype
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.grammar import GrammarCompiler
from pagedserve_engine.inputs import InputBuilder, staging_bytes
from pagedserve_engine.memory import (
    Memory,
    MemoryInputs,
    MemoryPlan,
    available_memory,
    cpu_limit,
    estimate_memory,
    format_bytes,
    plan_memory,
)
from pagedserve_engine.model.loader import LoadedModel, load_model
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.model.tokenizer import Tokenizer
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.runner import ModelRunner
from pagedserve_engine.sampling_state import SamplingState
from pagedserve_engine.scheduler.budget import PROMPT_LOGITS
from pagedserve_engine.scheduler.scheduler import Scheduler
from pagedserve_engine.staging import Staging

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Core:
    """A processor ready to be given to a manager, and what the HTTP side must know of its model."""

    processor: ContinuousBatchProcessor
    name: str
    spec: ModelSpec
    tokenizer: Tokenizer | None
    grammars: GrammarCompiler | None
    plan: MemoryPlan
    dtype: torch.dtype
    device: torch.device
    attention: str

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.plan.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.spec.vocab_size


def build_core(config: EngineConfig, *, steps_in_flight: int | None = None) -> Core:
    """Load the model and lay out memory; raises StartupError with what to change.

    ``steps_in_flight`` None: one where a device computes beside the host, none on a CPU.
    """
    device, before, loaded = _load(config)
    plan, layout, cache_dtype = plan_core(config, loaded, device, before=before)
    logger.info("memory: %s", describe(plan))
    if plan.lowered:
        logger.warning("memory does not allow all that was asked for; lowered %s", ", ".join(plan.lowered))
    tensors = CacheTensors(layout, plan.num_blocks, cache_dtype, device)
    grammars = None
    if loaded.tokenizer is not None:
        grammars = GrammarCompiler(
            loaded.tokenizer.transformers_tokenizer, loaded.spec.vocab_size, loaded.spec.eos_token_ids
        )
    staging = _staging(
        config, layout, device, max_batch_tokens=plan.max_batch_tokens, max_model_len=plan.max_model_len
    )
    sampling = SamplingState(
        loaded.spec.vocab_size,
        config.max_num_seqs,
        eos_token_ids=loaded.spec.eos_token_ids,
        device=device,
        grammars=grammars,
        staging=staging,
    )
    attention = choose_backend(config.attention, str(device))
    inputs = InputBuilder(
        layout,
        tensors,
        attention,
        staging,
        num_layers=loaded.spec.num_layers,
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
    )
    runner = ModelRunner(loaded.model, inputs, sampling, max_num_seqs=config.max_num_seqs)
    runner.warm_up(_WARM_UP_TOKENS, 2)
    return Core(
        processor=ContinuousBatchProcessor(
            _scheduler(config, plan, layout, loaded.spec),
            runner,
            steps_in_flight=int(device.type != "cpu") if steps_in_flight is None else steps_in_flight,
        ),
        name=loaded.name,
        spec=loaded.spec,
        tokenizer=loaded.tokenizer,
        grammars=grammars,
        plan=plan,
        dtype=loaded.dtype,
        device=device,
        attention=attention.name,
    )


def _load(config: EngineConfig) -> tuple[torch.device, Memory, LoadedModel]:
    """The device, its memory before anything was taken, and the model on it."""
    device = choose_device(config.device)
    prepare_threads(config, device)
    register()
    before = available_memory(device)
    return device, before, load_model(config, device, attention_name=ATTENTION_NAME)


def plan_only(config: EngineConfig) -> tuple[MemoryPlan, int]:
    """The memory plan of ``config`` and the formula's estimate beside it (bytes), without keeping anything."""
    device, before, loaded = _load(config)
    plan, layout, _ = plan_core(config, loaded, device, before=before)
    return plan, formula_bytes(plan, loaded.spec, layout)


def choose_device(setting: str) -> torch.device:
    """The device that DEVICE names; raises ConfigError where it isn't there."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise ConfigError(f"DEVICE is {setting!r}: give auto, cpu, cuda or cuda:N", param="device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"DEVICE is {setting!r}: give auto, cpu, cuda or cuda:N", param="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"DEVICE is {setting!r} and {torch.cuda.device_count()} CUDA devices are visible", param="device"
        )
    return device


def prepare_threads(config: EngineConfig, device: torch.device) -> None:
    """Let the model use the container's processors, no more; what exceeds a quota is throttled."""
    if config.use_cuda_graph:
        logger.warning(
            "USE_CUDA_GRAPH has no effect: this version launches every step from the host, on %s too", device
        )
    threads = cpu_limit() if config.num_threads == "auto" else config.num_threads
    torch.set_num_threads(threads)


def plan_core(
    config: EngineConfig, loaded: LoadedModel, device: torch.device, *, before: Memory
) -> tuple[MemoryPlan, CacheLayout, torch.dtype]:
    """The memory plan for a loaded model, its cache layout and the cache's dtype. ``before``: free before loading."""
    spec = loaded.spec
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, loaded.dtype)
    layout = CacheLayout.build(
        spec.layer_types,
        window=spec.sliding_window,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=config.block_size,
        dtype_bytes=cache_dtype.itemsize,
    )
    fixed, per_token = (
        measure_activations(config, loaded, layout, cache_dtype, device=device)
        if device.type == "cuda"
        else estimate_activations(spec, config.max_num_seqs)
    )
    inputs = MemoryInputs(
        total=before.total,
        free=before.free,
        max_memory_percent=config.max_memory_percent,
        weights=loaded.weights_bytes,
        activation_bytes_per_token=per_token,
        activation_fixed=fixed,
        layout=layout,
        num_blocks=config.num_blocks,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=config.max_model_len,
        model_max_len=spec.max_position_embeddings,
        max_num_seqs=config.max_num_seqs,
        device_type=device.type,
    )
    return plan_memory(inputs), layout, cache_dtype


def estimate_activations(spec: ModelSpec, max_num_seqs: int) -> tuple[int, float]:
    """(Fixed bytes, bytes per query token) of a step on a CPU, in float32: an upper bound read off the forward pass.

    Fixed: logits of every row in three copies while sampling, and one row's keys and values gathered. By token: the
    residual stream and its norms, queries, keys and values, both halves of the gated product.
    """
    logits = 3 * (max_num_seqs + PROMPT_LOGITS) * spec.vocab_size
    gathered = 4 * spec.num_kv_heads * spec.head_dim * spec.max_position_embeddings
    stream = 8 * spec.hidden_size + 3 * spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)
    return 4 * (logits + gathered), 4.0 * (stream + 4 * spec.intermediate_size)


def measure_activations(
    config: EngineConfig,
    loaded: LoadedModel,
    layout: CacheLayout,
    cache_dtype: torch.dtype,
    *,
    device: torch.device,
) -> tuple[int, float]:
    """(Fixed bytes, bytes per query token) of a step, from the peaks of two worst-case steps on the device."""
    tensors = CacheTensors(layout, 1, cache_dtype, device)
    large = 2048 if config.max_batch_tokens == "auto" else config.max_batch_tokens
    longest = loaded.spec.max_position_embeddings if config.max_model_len == "auto" else config.max_model_len
    staging = _staging(config, layout, device, max_batch_tokens=large, max_model_len=longest)
    sampling = SamplingState(
        loaded.spec.vocab_size, config.max_num_seqs, eos_token_ids=(), device=device, staging=staging
    )
    step_inputs = InputBuilder(
        layout,
        tensors,
        choose_backend(config.attention, str(device)),
        staging,
        num_layers=loaded.spec.num_layers,
        max_num_seqs=config.max_num_seqs,
        max_model_len=longest,
    )
    runner = ModelRunner(loaded.model, step_inputs, sampling, max_num_seqs=config.max_num_seqs)
    small = max(1, large // 2)
    peaks = []
    for tokens in (small, large):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
        runner.warm_up(tokens, config.max_num_seqs)
        peaks.append(torch.cuda.max_memory_allocated(device) - resting)
    per_token = max(0.0, (peaks[1] - peaks[0]) / max(1, large - small))
    return max(0, int(peaks[1] - per_token * large)), per_token


def _staging(
    config: EngineConfig, layout: CacheLayout, device: torch.device, *, max_batch_tokens: int, max_model_len: int
) -> Staging:
    capacity = staging_bytes(
        layout, max_num_seqs=config.max_num_seqs, max_batch_tokens=max_batch_tokens, max_model_len=max_model_len
    )
    return Staging(capacity, device)


def formula_bytes(plan: MemoryPlan, spec: ModelSpec, layout: CacheLayout) -> int:
    """What transformers' formula gives for cache and step, to stand beside the plan."""
    return estimate_memory(
        layout,
        cache_tokens=plan.num_blocks * plan.block_size,
        batch_tokens=plan.max_batch_tokens,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
    )


def describe(plan: MemoryPlan) -> str:
    """The plan in one line."""
    parts = {
        "weights": plan.weights,
        "activations": plan.activations,
        "cache": plan.cache,
        "budget": plan.budget,
    }
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    settings = ", ".join(f"{name} {actual}" for name, _, actual in plan.settings)
    return f"{sizes}; {settings}"


def _scheduler(config: EngineConfig, plan: MemoryPlan, layout: CacheLayout, spec: ModelSpec) -> Scheduler:
    cache = CacheManager(
        layout,
        num_blocks=plan.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
        prefix_cache=config.prefix_cache,
    )
    return Scheduler(
        cache,
        policy=config.scheduler,
        max_batch_tokens=plan.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
        safety_margin=config.safety_margin,
        eos_token_ids=spec.eos_token_ids,
    )
