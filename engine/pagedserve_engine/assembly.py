"""Puts the core together: device, model, memory plan, cache, runner, scheduler, processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from pagedserve_engine.attention.backends import choose_backend
from pagedserve_engine.attention.interface import ATTENTION_NAME, AttentionBackend, register
from pagedserve_engine.building import build_runner, capture, choose_device, prepare_threads
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.cache.tensors import CacheTensors
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.footprint import formula_bytes, plan_core
from pagedserve_engine.grammar import GrammarCompiler
from pagedserve_engine.graphs import Recorder
from pagedserve_engine.lockstep import LockstepRunner, follow
from pagedserve_engine.memory import Memory, MemoryPlan, available_memory, format_bytes
from pagedserve_engine.model.loader import LoadedModel, load_model
from pagedserve_engine.model.progress import NoBar
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.model.tokenizer import Tokenizer
from pagedserve_engine.phases import Phases
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.rank_process import Entry
from pagedserve_engine.ranks import ALONE, Rank, device_of
from pagedserve_engine.runner import ModelRunner
from pagedserve_engine.scheduler.scheduler import Scheduler
from pagedserve_engine.speculation import NgramDrafter
from pagedserve_engine.workers import Workers

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
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each part of the start took."""

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
    phases = Phases()
    workers = start_workers(config, serve_rank)
    with nullcontext() if workers is None else workers.starting():
        part = prepare(config, ALONE if workers is None else workers.rank, phases=phases, recorder=recorder)
    loaded, device = part.loaded, part.device
    logger.info("the core is ready after %s", phases.describe())
    return Core(
        processor=ContinuousBatchProcessor(
            _scheduler(config, part.plan, part.layout, loaded.spec),
            part.runner if workers is None else LockstepRunner(part.runner, workers),
            steps_in_flight=choose_steps_in_flight(config, device) if steps_in_flight is None else steps_in_flight,
            peers=workers,
        ),
        runner=part.runner,
        name=loaded.name,
        spec=loaded.spec,
        tokenizer=loaded.tokenizer,
        grammars=part.grammars,
        plan=part.plan,
        dtype=loaded.dtype,
        device=device,
        attention=part.runner.attention.name,
        phases=phases.seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank computes with."""

    runner: ModelRunner
    loaded: LoadedModel
    plan: MemoryPlan
    layout: CacheLayout
    grammars: GrammarCompiler | None
    device: torch.device


def prepare(config: EngineConfig, rank: Rank, *, phases: Phases, recorder: Recorder | None = None) -> Part:
    """What ``rank`` computes with, ready to run; all ranks do this together."""
    with phases.measure("weights"):
        device, attention, before, loaded = _load(config, rank)
    if rank.world > 1:
        with phases.measure("other ranks"):
            rank.connect(device)
    with phases.measure("memory plan"):
        plan, layout, cache_dtype = plan_core(config, loaded, device, attention, before=before, rank=rank)
    if rank.index == 0:
        _tell(plan)
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
        attention,
        layout=layout,
        max_batch_tokens=plan.max_batch_tokens,
        max_model_len=plan.max_model_len,
        grammars=grammars,
    )
    with phases.measure("warm-up"):
        runner.warm_up(_WARM_UP_TOKENS, 2)
    with phases.measure("graphs"):
        capture(config, runner, recorder=recorder, progress=rank.index == 0)
    # Captured steps are padded: all ranks replay them, or none.
    if not all(rank.exchange(runner.graphs is not None)):
        runner.release_graphs()
    return Part(runner=runner, loaded=loaded, plan=plan, layout=layout, grammars=grammars, device=device)


def serve_rank(config: EngineConfig, rank: Rank, leader: Connection) -> None:
    """What a rank beside rank 0 does all its life."""
    follow(leader, prepare(config, rank, phases=Phases()).runner)


def plan_rank(config: EngineConfig, rank: Rank, leader: Connection) -> None:
    """What a rank beside rank 0 does where only the plan is wanted."""
    _plan(config, rank)
    leader.recv_bytes()


def start_workers(config: EngineConfig, entry: Entry) -> Workers | None:
    """The processes of the ranks beside rank 0; None where there are none. Raises ConfigError for missing devices."""
    world = config.tensor_parallel_size
    if world == 1:
        return None
    device_of(0, world, choose_device(config.device))
    return Workers(config, entry)


def choose_steps_in_flight(config: EngineConfig, device: torch.device) -> int:
    """One where a device computes beside the host, none on a CPU, and none where drafts need every token known."""
    if device.type == "cpu" or config.speculation == "none":
        return int(device.type != "cpu")
    logger.info("SPECULATION is %s: a step is read before the next one is launched", config.speculation)
    return 0


def _load(config: EngineConfig, rank: Rank) -> tuple[torch.device, AttentionBackend, Memory, LoadedModel]:
    """The rank's device, how it attends, its memory before anything was taken, and its part of the model on it."""
    device = device_of(rank.index, rank.world, choose_device(config.device))
    # A setting that the device can't serve is refused before the weights are read.
    attention = choose_backend(config.attention, str(device))
    if device.type == "cuda" and rank.world > 1:
        torch.cuda.set_device(device)
    prepare_threads(config, rank.world)
    register()
    before = available_memory(device)
    if device.type == "cpu":
        before = Memory(free=before.free // rank.world, total=before.total // rank.world)
    progress = None if rank.index == 0 else NoBar
    loaded = load_model(config, device, attention_name=ATTENTION_NAME, progress=progress, rank=rank)
    return device, attention, before, loaded


def plan_only(config: EngineConfig) -> tuple[MemoryPlan, int]:
    """The memory plan of ``config`` and the formula's estimate beside it (bytes), without keeping anything."""
    workers = start_workers(config, plan_rank)
    if workers is None:
        return _plan(config, ALONE)
    with workers.starting():
        found = _plan(config, workers.rank)
    workers.close()
    return found


def _plan(config: EngineConfig, rank: Rank) -> tuple[MemoryPlan, int]:
    device, attention, before, loaded = _load(config, rank)
    rank.connect(device)
    plan, layout, _ = plan_core(config, loaded, device, attention, before=before, rank=rank)
    return plan, formula_bytes(plan, loaded.spec, layout)


def _tell(plan: MemoryPlan) -> None:
    logger.info("memory: %s", describe(plan))
    if plan.lowered:
        logger.warning("memory does not allow all that was asked for; lowered %s", ", ".join(plan.lowered))


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
