"""The runner: what a launch may not do, and what a step in flight must not lose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from device_waits import device_waits
from models import tiny_model
from pagedserve_engine import sampling_filters
from pagedserve_engine.batch import Batch, PendingStep
from pagedserve_engine.errors import OutOfDeviceMemoryError
from pagedserve_engine.runner import ModelRunner
from stepping import SteppedEngine

MIXES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}, {}],
    "drawn": [{"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "seed": 2}],
    "filtered": [{"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3}, {}],
    "penalised": [{"frequency_penalty": 0.5}, {"repetition_penalty": 1.3, "temperature": 0.8, "seed": 4}, {}],
    "biased": [{"logit_bias": {9: 5.0, 11: -5.0}}, {}],
    "with least tokens": [{"min_tokens": 4, "stop_token_ids": (7, 8), "ignore_eos": False}, {}],
    "with log probabilities": [{"logprobs": 3}, {"logprobs": 0, "temperature": 1.0, "seed": 5}, {}],
    "with scored prompts": [{"prompt_logprobs": 2}, {}],
}
MIXES["of everything"] = [params for mix in MIXES.values() for params in mix]


class WatchedRunner:
    """Notes what a launch would wait for."""

    def __init__(self, inner: ModelRunner) -> None:
        self.inner = inner
        self.waits: list[str] = []
        self.num_launches = 0

    def launch(self, batch: Batch) -> PendingStep:
        self.num_launches += 1
        with device_waits() as found:
            pending = self.inner.launch(batch)
        self.waits += found
        return pending


def engine_of(depth: int, **settings: Any) -> SteppedEngine:
    return SteppedEngine(tiny_model("llama")[1], steps_in_flight=depth, num_threads=1, **settings)


def add_mix(engine: SteppedEngine, mix: list[dict[str, Any]], *, stagger: bool = True) -> None:
    """Requests of several lengths, some while others decode, so that steps are mixed."""
    for at, params in enumerate(mix):
        engine.add([3 + (at * 31 + n * 7) % 90 for n in range(3 + 9 * (at % 3))], 6 + at % 3, **params)
        if stagger:
            engine.step()


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_launch_waits_for_nothing(mix: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU floors are found by looking at values, which costs nothing there; devices find them this way.
    monkeypatch.setattr(sampling_filters, "floors_by_candidates", sampling_filters.floors_by_bisection)
    engine = engine_of(1, max_batch_tokens=16, attention="reference")
    watched = WatchedRunner(engine.processor._runner)  # type: ignore[arg-type]
    engine.processor._runner = watched
    add_mix(engine, mix)
    engine.run()
    assert watched.num_launches > 6
    assert watched.waits == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.to("cpu"),
        lambda tensor: tensor.numpy(),
        lambda tensor: bool(tensor > 0),
        lambda tensor: (tensor > 0).nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: torch.unique(tensor),
    ],
    ids=["item", "tolist", "cpu", "to", "numpy", "bool", "nonzero", "mask", "masked_select", "unique"],
)
def test_what_would_wait_is_noticed(wait: Any) -> None:
    with device_waits() as found:
        wait(torch.ones(1))
    assert found


def test_what_does_not_wait_is_not_noticed() -> None:
    values = torch.ones(4)
    with device_waits() as found:
        values.to("cpu", non_blocking=True)
        values.index_select(0, torch.zeros(2, dtype=torch.int64))
        torch.where(values > 0, values, 0.0).sum(-1)
    assert found == []


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_step_in_flight_changes_nothing_that_a_request_is_told(mix: list[dict[str, Any]]) -> None:
    told = []
    for depth in (0, 1):
        engine = engine_of(depth, max_batch_tokens=64)
        add_mix(engine, mix, stagger=False)
        engine.run()
        told.append({request_id: engine.tokens(request_id) for request_id in engine.requests})
        scores = {request_id: [news.logprobs for news in engine.news[request_id]] for request_id in engine.requests}
        told.append({key: [entry[0].token_id for entry in row if entry] for key, row in scores.items()})
    assert told[:2] == told[2:]


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_requests_with_penalties_and_seeds_go_on_as_if_alone(depth: int) -> None:
    params = {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "seed": 8}
    prompts = [[5 + n, *range(20, 29 + n)] for n in range(4)]
    outputs = []
    for num_blocks in (200, 14):
        engine = engine_of(depth, block_size=4, num_blocks=num_blocks, safety_margin=0.0, max_batch_tokens=64)
        for prompt in prompts:
            engine.add(prompt, 14, **params)
        engine.run()
        outputs.append([engine.tokens(request_id) for request_id in engine.requests])
    assert engine.scheduler.num_preemptions > 0
    assert outputs[0] == outputs[1]


class Unlucky:
    """Fails a launch now and then, before anything was queued."""

    def __init__(self, inner: ModelRunner, failures: set[int]) -> None:
        self._inner = inner
        self._failures = failures
        self._launches = 0

    def launch(self, batch: Batch) -> PendingStep:
        self._launches += 1
        if self._launches in self._failures:
            raise OutOfDeviceMemoryError("full")
        return self._inner.launch(batch)


@pytest.mark.parametrize("depth", [0, 1])
def test_out_of_memory_with_a_step_in_flight_loses_nothing(depth: int) -> None:
    mix = MIXES["of everything"][:7]
    outputs = []
    for failures in (set[int](), {2, 5, 9}):
        engine = engine_of(depth, max_batch_tokens=64)
        runner = Unlucky(engine.processor._runner, failures)  # type: ignore[arg-type]
        engine.processor._runner = runner
        add_mix(engine, mix, stagger=False)
        engine.run()
        outputs.append([engine.tokens(request_id) for request_id in engine.requests])
    assert engine.scheduler.max_batch_tokens < 64
    assert outputs[0] == outputs[1]


def test_a_pending_step_is_whole_after_another_was_launched() -> None:
    """The inputs' memory belongs to the later step by the time the earlier one is read."""
    outputs = []
    for overtaken in (False, True):
        engine = engine_of(0)
        engine.add([5, 6, 7], 5, logprobs=2)
        engine.add([8, 9, 10, 11], 5, prompt_logprobs=1)
        batch = engine.scheduler.schedule()
        assert batch is not None
        pending = engine.processor._runner.launch(batch)
        if overtaken:
            nulls = tuple(np.zeros_like(table) for table in batch.block_tables)
            others = np.full_like(batch.token_ids, 9)
            engine.processor._runner.launch(replace(batch, token_ids=others, block_tables=nulls, admitted=()))
        output = pending.read()
        outputs.append((output.token_ids.tolist(), output.logprobs, output.prompt_logprobs))
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_launch_waits_for_nothing_on_the_device(mix: list[dict[str, Any]]) -> None:
    engine = SteppedEngine(tiny_model("llama")[1], device="cuda", steps_in_flight=1, max_batch_tokens=16)
    runner = engine.processor._runner

    class Strict:
        def launch(self, batch: Batch) -> PendingStep:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return runner.launch(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    engine.processor._runner = Strict()
    add_mix(engine, mix)
    engine.run()


def test_the_number_of_steps_in_flight_follows_the_device() -> None:
    assert engine_of(0).processor.steps_in_flight == 0
    assert SteppedEngine(tiny_model("llama")[1], num_threads=1).processor.steps_in_flight == 0
    assert engine_of(1).processor.steps_in_flight == 1
