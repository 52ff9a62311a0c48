"""transformers' own continuous batching on the same shape, with the settings that it finds for itself."""

from __future__ import annotations

import inspect
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.gpu.bench import Bench, TimeOver
from benchmarks.gpu.mixed import Lengths, lengths, progress, throughput
from benchmarks.results import Row

PEER = "transformers_cb"
PEER_SECONDS = 100.0
_AUTO_MODEL: Any = AutoModelForCausalLM
_GENERATION: Any = GenerationConfig
"""transformers gives these no types."""


def mixed(bench: Bench, workload: str, config: Path) -> Iterator[Row]:
    """The first requests of the same workload; what is not done in time is counted as far as it came."""
    model = _model(bench, config)
    chosen = lengths(bench, bench.scale.mixed_peer)
    vocabulary = json.loads(config.read_text())["vocab_size"]
    source = random.Random(workload)
    prompts = [[source.randrange(3, vocabulary) for _ in range(request.prompt)] for request in chosen]
    with model.continuous_batching_context_manager(**_arguments(bench, model, chosen)) as manager:
        warm_up(manager, prompts[0])
        limit = min(PEER_SECONDS, bench.seconds_left() - 8.0)
        started = time.perf_counter()
        for prompt, request in zip(prompts, chosen, strict=True):
            manager.add_request(prompt, max_new_tokens=request.output)
        finished = collect(manager, len(chosen), deadline=started + limit)
        seconds = time.perf_counter() - started
        tokens = sum(finished) + (0 if len(finished) == len(chosen) else _unfinished(manager))
    yield throughput(workload, PEER, tokens, seconds, note=progress(len(finished), len(chosen)))
    yield Row(workload, PEER, "duration", seconds, "s")


def _model(bench: Bench, config: Path) -> Any:
    with torch.device(bench.device):
        torch.manual_seed(0)
        model = _AUTO_MODEL.from_config(
            AutoConfig.from_pretrained(config.parent),
            dtype=getattr(torch, bench.scale.dtype),
            attn_implementation="sdpa",
        )
    return model.eval().requires_grad_(False)


def _arguments(bench: Bench, model: Any, chosen: list[Lengths]) -> dict[str, Any]:
    """What this version's manager takes: sizes of the workload, where it asks for them."""
    known = set(inspect.signature(model.continuous_batching_context_manager).parameters)
    # No token has the id -1: outputs have the length asked for.
    arguments: dict[str, Any] = {"generation_config": _GENERATION(do_sample=False, eos_token_id=-1), "timeout": 5}
    if bench.device == "cpu":
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=256, max_requests_per_batch=8)
        arguments["continuous_batching_config"] = small
    if "workload_hints" in known:
        from transformers.generation.continuous_batching.utils import WorkloadHints

        arguments["workload_hints"] = WorkloadHints(
            max_prompt_length=max(request.prompt for request in chosen),
            max_generated_length=max(request.output for request in chosen),
            num_requests=len(chosen),
        )
    return arguments


def warm_up(manager: Any, prompt: list[int]) -> None:
    """One request on its own, so that nothing is loaded or captured for the first time under the clock."""
    manager.add_request(prompt, max_new_tokens=4)
    if not collect(manager, 1, deadline=time.perf_counter() + 60):
        raise TimeOver(f"transformers {transformers.__version__} did not answer one request within 60 s")


def collect(manager: Any, count: int, *, deadline: float) -> list[int]:
    """Output lengths of what finishes before ``deadline``."""
    finished: list[int] = []
    while len(finished) < count and time.perf_counter() < deadline:
        output = manager.get_result(timeout=1)
        if output is not None and output.error:
            raise RuntimeError(f"transformers {transformers.__version__}: {output.error}")
        if output is not None and output.is_finished():
            finished.append(len(output.generated_tokens))
        if output is None and not manager.is_running():
            raise RuntimeError(f"transformers {transformers.__version__}: the generation thread ended")
    return finished


def _unfinished(manager: Any) -> int:
    """Tokens of requests that still run: they count for the peer too."""
    active = manager.batch_processor.scheduler.active_requests
    return sum(len(request.generated_tokens) for request in list(active.values()))
