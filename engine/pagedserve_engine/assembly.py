"""Puts the core together: device, model, memory plan, cache, runner, scheduler, processor."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from pagedserve_engine.attention.interface import ATTENTION_NAME, register
from pagedserve_engine.building import attention_of, build_runner, capture, choose_device, prepare_threads
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.cache.tensors import CacheTensors
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.footprint import formula_bytes, plan_core
from pagedserve_engine.grammar import GrammarCompiler
from pagedserve_engine.graphs import Recorder
from pagedserve_engine.memory import Memory, MemoryPlan, available_memory, format_bytes
from pagedserve_engine.model.loader import LoadedModel, load_model
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.model.tokenizer import Tokenizer
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.runner import ModelRunner
from pagedserve_engine.scheduler.scheduler import Scheduler
from pagedserve_engine.speculation import NgramDrafter

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Core:
    """A processor ready to be given to a manager, and what the HTTP side must know of its model."""

    processor: ContinuousBatchProcessor
    runner: ModelRunner
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


def build_core(config: EngineConfig, *, steps_in_flight: int | None = None, recorder: Recorder | None = None) -> Core:
    """Load the model and lay out memory; raises StartupError with what to change.

    ``steps_in_flight`` None: one where a device computes beside the host, none on a CPU. A ``recorder`` captures steps
    where there are no CUDA graphs.
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
    runner = build_runner(
        config,
        loaded,
        tensors,
        layout=layout,
        max_batch_tokens=plan.max_batch_tokens,
        max_model_len=plan.max_model_len,
        grammars=grammars,
    )
    runner.warm_up(_WARM_UP_TOKENS, 2)
    capture(config, runner, device, recorder=recorder)
    return Core(
        processor=ContinuousBatchProcessor(
            _scheduler(config, plan, layout, loaded.spec),
            runner,
            steps_in_flight=choose_steps_in_flight(config, device) if steps_in_flight is None else steps_in_flight,
        ),
        runner=runner,
        name=loaded.name,
        spec=loaded.spec,
        tokenizer=loaded.tokenizer,
        grammars=grammars,
        plan=plan,
        dtype=loaded.dtype,
        device=device,
        attention=attention_of(config, device).name,
    )


def choose_steps_in_flight(config: EngineConfig, device: torch.device) -> int:
    """One where a device computes beside the host, none on a CPU, and none where drafts need every token known."""
    if device.type == "cpu" or config.speculation == "none":
        return int(device.type != "cpu")
    logger.info("SPECULATION is %s: a step is read before the next one is launched", config.speculation)
    return 0


def _load(config: EngineConfig) -> tuple[torch.device, Memory, LoadedModel]:
    """The device, its memory before anything was taken, and the model on it."""
    device = choose_device(config.device)
    prepare_threads(config)
    register()
    before = available_memory(device)
    return device, before, load_model(config, device, attention_name=ATTENTION_NAME)


def plan_only(config: EngineConfig) -> tuple[MemoryPlan, int]:
    """The memory plan of ``config`` and the formula's estimate beside it (bytes), without keeping anything."""
    device, before, loaded = _load(config)
    plan, layout, _ = plan_core(config, loaded, device, before=before)
    return plan, formula_bytes(plan, loaded.spec, layout)


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
        drafter=None if config.speculation == "none" else NgramDrafter(config.speculation_tokens),
    )
