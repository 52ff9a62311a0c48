"""Decoding steps of a fixed batch and context, against what the card's bandwidth allows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.bench import US, Bench
from benchmarks.gpu.driver import WARM_STEPS, Driver
from benchmarks.gpu.shape import Shape
from benchmarks.results import Row

ROW_SECONDS = 60.0
FULL_SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.2,
    "logit_bias": {7: 1.0, 11: -1.0},
    "seed": 1,
}


def decode(
    bench: Bench, driver: Driver, workload: str, batch: int, *, engine: str = US, number_bytes: float = 2
) -> Iterator[Row]:
    """Time of a step, tokens per second, and the bound; ``number_bytes`` of layers' weights and of the cache."""
    samples, context = step_seconds(bench, driver, batch, contents=workload)
    milliseconds = [1e3 * sample for sample in samples]
    yield Row.median(workload, engine, "step", milliseconds, "ms")
    yield Row.median(workload, engine, "throughput", [batch / sample for sample in samples], "tok/s")
    yield Row(workload, engine, "context", round(context, 1), "tokens")
    yield from bounds(bench, workload, milliseconds, (batch, context), engine=engine, number_bytes=number_bytes)


def bounds(
    bench: Bench,
    workload: str,
    milliseconds: list[float],
    load: tuple[int, float],
    *,
    engine: str = US,
    number_bytes: float = 2,
) -> Iterator[Row]:
    """What bandwidth and products allow at best for a ``load`` of (rows, tokens that each holds)."""
    batch, context = load
    shape = Shape.read(bench.scale.large)
    if "bandwidth" in bench.limits:
        read = shape.weight_bytes(layer_bytes=number_bytes)
        read += batch * context * shape.cache_bytes(number_bytes=number_bytes)
        bound = 1e3 * read / bench.limits["bandwidth"]
        note = f"{read / 1e9:.2f} GB read at {bench.limits['bandwidth'] / 1e12:.3g} TB/s"
        yield Row(workload, engine, "bound", bound, "ms", note=note)
        yield Row.median(workload, engine, "step_over_bound", [value / bound for value in milliseconds], "x")
    if "product" in bench.limits:
        flop = 2 * batch * (shape.layer_weights + shape.head_weights)
        yield Row(workload, engine, "product_bound", 1e3 * flop / bench.limits["product"], "ms")


def step_seconds(
    bench: Bench, driver: Driver, batch: int, *, contents: object, **params: Any
) -> tuple[list[float], float]:
    """Seconds of a decoding step for each window, and the context half way through."""
    scale = bench.scale
    measured = scale.windows * scale.steps
    tokens = max(1, scale.context - measured // 2 - WARM_STEPS)
    # Rows that were admitted first decode while the last ones still prefill: at most a step for every row.
    most = measured + batch + 2 * WARM_STEPS + 8
    deadline = time.monotonic() + min(ROW_SECONDS, bench.seconds_left())
    with driver.decoding(batch, tokens=tokens, max_tokens=most, contents=contents, deadline=deadline, **params):
        before = driver.context
        samples = driver.step_seconds(windows=scale.windows, steps=scale.steps)
        return samples, (before + driver.context) / 2


def sampling(bench: Bench, driver: Driver, batch: int) -> Iterator[Row]:
    """A step with the full sampling set beside one with argmax, by turns."""
    plain: list[float] = []
    full: list[float] = []
    for turn in range(2):
        plain += step_seconds(bench, driver, batch, contents=("argmax", turn))[0]
        full += step_seconds(bench, driver, batch, contents=("sampled", turn), **FULL_SAMPLING)[0]
    yield Row.median("sampling_128", US, "step_argmax", [1e3 * value for value in plain], "ms")
    yield Row.median("sampling_128", US, "step_sampled", [1e3 * value for value in full], "ms")
