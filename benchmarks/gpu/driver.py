"""Drives the engine's core step by step, without its thread and without HTTP, so that each step can be timed."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, TimeOver
from pagedserve_engine.assembly import Core, build_core
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.request import RequestState, SamplingParams

GREEDY = {"temperature": 0.0, "ignore_eos": True}
WARM_STEPS = 4


def engine_config(bench: Bench, model: Path, **changes: Any) -> EngineConfig:
    """The benchmark's settings with ``changes``; raises ConfigError for what the engine doesn't know."""
    settings = {"device": bench.device, "dtype": bench.scale.dtype, **bench.scale.settings, **changes}
    return EngineConfig(model=f"random://{model}", cache_dir=bench.folder / "models", **settings)


class Driver:
    """One engine, whose steps are taken by whoever holds it."""

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        self.core: Core = build_core(config)
        self.build_seconds = time.perf_counter() - started
        self.requests: list[RequestState] = []
        """Those added since the last ``clear``."""
        self.num_generated = 0
        """Tokens that have come back since the start."""

    def add(self, prompt_ids: Sequence[int], max_tokens: int, **params: Any) -> None:
        """Queue one request, greedy unless ``params`` say otherwise."""
        request = RequestState.create(
            f"bench-{len(self.requests)}",
            prompt_ids,
            SamplingParams(max_tokens=max_tokens, **{**GREEDY, **params}),
            arrival_time=time.monotonic(),
            max_model_len=self.core.max_model_len,
        )
        self.requests.append(request)
        refused = self.core.processor.add_request(request)
        if refused is not None and refused.error is not None:
            raise refused.error

    def prompt(self, tokens: int, seed: object) -> list[int]:
        """Token ids that no other seed begins with."""
        source = random.Random(str(seed))
        return [source.randrange(3, self.core.vocab_size) for _ in range(tokens)]

    def step(self) -> None:
        """One step; a request that failed fails the measurement."""
        outputs, _ = self.core.processor.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
            self.num_generated += len(output.token_ids)

    def run_until(self, done: Callable[[], bool], *, deadline: float) -> None:
        """Step until ``done``; raises TimeOver at ``deadline`` (monotonic seconds)."""
        while not done():
            if time.monotonic() > deadline:
                raise TimeOver("the requests did not get so far within the row's time")
            self.step()

    @contextmanager
    def decoding(
        self, batch: int, *, tokens: int, max_tokens: int, contents: object, deadline: float, **params: Any
    ) -> Iterator[None]:
        """``batch`` requests of ``tokens`` prompt tokens, all of them decoding; ended on the way out."""
        try:
            for row in range(batch):
                self.add(self.prompt(tokens, (contents, row)), max_tokens, **params)
            self.run_until(lambda: all(request.output_ids for request in self.requests), deadline=deadline)
            for _ in range(WARM_STEPS):
                self.step()
            yield
        finally:
            self.clear()

    @property
    def context(self) -> float:
        """Tokens that a request holds, on average."""
        return sum(request.num_tokens for request in self.requests) / len(self.requests)

    def step_seconds(self, *, windows: int, steps: int) -> list[float]:
        """Seconds of a step, the mean over ``steps`` of them, for each window."""
        samples = []
        for _ in range(windows):
            started = time.perf_counter()
            for _ in range(steps):
                self.step()
            samples.append((time.perf_counter() - started) / steps)
        if any(request.finished for request in self.requests):
            raise RuntimeError("a request ended while the clock ran")
        return samples

    def clear(self) -> None:
        """Cancel the requests and step until nothing is left of them."""
        for request in self.requests:
            self.core.processor.cancel(request.request_id)
        self.requests.clear()
        while not self.core.processor.scheduler.idle:
            self.step()


@contextmanager
def driving(bench: Bench, model: Path, **changes: Any) -> Iterator[Driver]:
    """A core of its own, its memory given back on the way out."""
    driver = Driver(engine_config(bench, model, **changes))
    try:
        yield driver
    finally:
        del driver.core
        gc.collect()
        if bench.device != "cpu":
            torch.cuda.empty_cache()
