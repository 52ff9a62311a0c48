"""The engine on a CUDA device: exact, captured steps equal to launched ones, no waits, nothing lost, nothing leaked.

These run where there is only torch, triton, transformers and pytest; `make test-gpu` collects them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models import load_reference, tiny_model
from pagedserve_engine.batch import Batch, PendingStep
from pagedserve_engine.graphs import graph_sizes
from pagedserve_engine.memory import available_memory
from pagedserve_engine.runner import ModelRunner
from stepping import Exactness, SteppedEngine

pytestmark = pytest.mark.gpu

TINY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")
MOST_ROWS = 64
NUM_ARRIVALS = 20_000
ARRIVALS_A_STEP = 6.0

MIXES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}, {}],
    "drawn": [{"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "seed": 2, "top_p": 0.9, "top_k": 20}, {}],
    "penalised": [{"frequency_penalty": 0.5}, {"repetition_penalty": 1.3, "temperature": 0.8, "seed": 4}, {}],
    "biased": [{"logit_bias": {9: 5.0, 11: -5.0}}, {"min_tokens": 4, "stop_token_ids": (7,), "ignore_eos": False}],
    "with log probabilities": [{"logprobs": 3}, {"prompt_logprobs": 2}, {}],
}


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
@pytest.mark.parametrize("name", TINY)
def test_every_family_is_exact_on_the_device(name: str, scheduler: str, graphs: bool) -> None:
    engine = engine_of(
        name, block_size=8, num_blocks=200, max_batch_tokens=40, scheduler=scheduler, use_cuda_graph=graphs
    )
    rng = np.random.default_rng(0)
    for length in (1, 9, 17, 40, 33, 70):
        engine.add(rng.integers(3, engine.core.vocab_size, length).tolist(), 12)
    engine.run()
    Exactness(load_reference(tiny_model(name)[1]).to("cuda")).check_all(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_captured_size_brings_the_tokens_of_launched_steps(name: str, dtype: str) -> None:
    settings: dict[str, Any] = {"max_num_seqs": MOST_ROWS, "num_blocks": 2000, "dtype": dtype}
    launched, captured = engine_of(name, **settings), engine_of(name, use_cuda_graph=True, **settings)
    assert captured.core.runner.graphs is not None
    for size in graph_sizes(MOST_ROWS):
        for drawn in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": size}):
            outputs = [tokens_of(engine, size, drawn) for engine in (launched, captured)]
            assert outputs[0] == outputs[1], f"{size} rows, {drawn or 'greedy'}"


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_launch_waits_for_nothing(mix: list[dict[str, Any]], graphs: bool) -> None:
    engine = engine_of("llama", use_cuda_graph=graphs)
    # Compiling, and setting up libraries, may wait: the second time is what counts.
    add_mix(engine, mix)
    engine.run()
    engine.processor._runner = UnwaitingRunner(engine.core.runner)
    add_mix(engine, mix)
    engine.run()


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "captured"])
def test_the_plan_counts_what_the_device_reports(graphs: bool) -> None:
    before = available_memory("cuda")
    engine = engine_of("llama", num_blocks=20_000, max_num_seqs=MOST_ROWS, use_cuda_graph=graphs)
    taken = before.free - available_memory("cuda").free
    plan = engine.core.plan
    assert (plan.graphs > 0) == graphs
    assert plan.cache <= taken
    assert torch.cuda.memory_reserved() <= plan.used + (256 << 20)
    if engine.core.runner.graphs is not None:
        assert engine.core.runner.graphs.num_bytes <= plan.graphs + (64 << 20)


def test_thousands_of_short_requests_leave_every_block_free_and_no_memory_taken() -> None:
    engine = engine_of("llama", max_num_seqs=MOST_ROWS, num_blocks=600, use_cuda_graph=True)
    rng = np.random.default_rng(7)
    taken = 0
    while len(engine.requests) < NUM_ARRIVALS:
        for _ in range(min(rng.poisson(ARRIVALS_A_STEP), NUM_ARRIVALS - len(engine.requests))):
            prompt = rng.integers(3, engine.core.vocab_size, int(rng.integers(1, 40))).tolist()
            engine.add(
                prompt, int(rng.integers(1, 9)), temperature=float(rng.integers(0, 2)), seed=len(engine.requests)
            )
        engine.step()
        if not taken and len(engine.requests) > NUM_ARRIVALS // 10:
            taken = torch.cuda.memory_reserved()
    engine.run()
    assert all(engine.last(request_id).finished for request_id in engine.requests)
    assert all(len(engine.tokens(name)) == request.max_tokens for name, request in engine.requests.items())
    assert torch.cuda.memory_reserved() <= 1.01 * taken


class UnwaitingRunner:
    """Launches with CUDA set to raise where the host would wait for the device."""

    def __init__(self, inner: ModelRunner) -> None:
        self._inner = inner

    def launch(self, batch: Batch) -> PendingStep:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._inner.launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def engine_of(name: str, **settings: Any) -> SteppedEngine:
    return SteppedEngine(tiny_model(name)[1], **{"device": "cuda", "max_model_len": 128, **settings})


def add_mix(engine: SteppedEngine, mix: list[dict[str, Any]]) -> None:
    """Requests of several lengths, some while others decode, so that steps are mixed."""
    for at, params in enumerate(mix):
        engine.add([3 + (at * 31 + n * 7) % 90 for n in range(3 + 9 * (at % 3))], 6 + at % 3, **params)
        engine.step()


def tokens_of(engine: SteppedEngine, num_rows: int, params: dict[str, Any]) -> list[list[int]]:
    """What so many requests get that decode side by side all the time."""
    prompts = [[3 + (7 * row + place) % 200 for place in range(1 + row % 5)] for row in range(num_rows)]
    names = [engine.add(prompt, 6, **params) for prompt in prompts]
    engine.run()
    return [engine.tokens(name) for name in names]
