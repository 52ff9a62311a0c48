"""Unequal requests, all submitted at once: the engine through its core, its peer through its own manager."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.bench import US, Bench
from benchmarks.gpu.driver import Driver
from benchmarks.results import Row

OUR_SECONDS = 75.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one request."""

    prompt: int
    output: int


def lengths(bench: Bench, count: int) -> list[Lengths]:
    """Uniform and the same for everybody: the first ``count`` of them."""
    source = random.Random("mixed")
    low, high = bench.scale.mixed_tokens
    return [Lengths(source.randint(low, high), source.randint(low, high)) for _ in range(count)]


def mixed(bench: Bench, driver: Driver, workload: str) -> Iterator[Row]:
    """Output tokens per second, prefill included; what is not done in time is counted as far as it came."""
    chosen = lengths(bench, bench.scale.mixed)
    prompts = [driver.prompt(request.prompt, (workload, row)) for row, request in enumerate(chosen)]
    limit = min(OUR_SECONDS, bench.seconds_left() - 5.0)
    generated, started = driver.num_generated, time.perf_counter()
    try:
        for prompt, request in zip(prompts, chosen, strict=True):
            driver.add(prompt, request.output)
        while not driver.core.processor.scheduler.idle and time.perf_counter() - started < limit:
            driver.step()
        seconds = time.perf_counter() - started
        finished = sum(request.finished for request in driver.requests)
    finally:
        driver.clear()
    done = driver.num_generated - generated
    yield throughput(workload, US, done, seconds, note=progress(finished, len(chosen)))
    yield Row(workload, US, "duration", seconds, "s")


def throughput(workload: str, engine: str, tokens: int, seconds: float, *, note: str) -> Row:
    """One run's row; a second run of the same length would not fit into the time."""
    value = tokens / seconds
    return Row(workload, engine, "throughput", value, "tok/s", [round(value, 2)], note=note)


def progress(finished: int, count: int) -> str:
    """How much of the work was done."""
    return f"{finished} of {count} requests" + ("" if finished == count else " when the row's time was over")
