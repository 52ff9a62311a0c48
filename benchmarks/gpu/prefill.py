"""Prompts alone: operations per second against the fastest large product of the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.gpu.bench import US, Bench
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.shape import PREFILL_FORMULA, Shape
from benchmarks.results import Row

REPEATS = 5
ROW_SECONDS = 60.0


def prefill(bench: Bench, driver: Driver) -> Iterator[Row]:
    """From the arrival of all prompts to the first token of the last one; other contents at each repetition."""
    prompts, tokens = bench.scale.prefill
    deadline = time.monotonic() + min(ROW_SECONDS, bench.seconds_left())
    seconds = [_seconds(driver, prompts, tokens, repetition, deadline) for repetition in range(REPEATS + 1)][1:]
    flop = Shape.read(bench.scale.large).prefill_flop(prompts, tokens)
    yield Row.median("prefill_8x2k", US, "throughput", [prompts * tokens / value for value in seconds], "tok/s")
    rates = [flop / value / 1e12 for value in seconds]
    formula = f"{flop / 1e12:.4g} TFLOP: {PREFILL_FORMULA}"
    yield replace(Row.median("prefill_8x2k", US, "rate", rates, "TFLOP/s"), note=formula)
    if "product" in bench.limits:
        shares = [1e12 * rate / bench.limits["product"] for rate in rates]
        yield Row.median("prefill_8x2k", US, "share_of_product", shares, "x")


def _seconds(driver: Driver, prompts: int, tokens: int, repetition: int, deadline: float) -> float:
    ids = [driver.prompt(tokens, ("prefill", repetition, row)) for row in range(prompts)]
    started = time.perf_counter()
    try:
        for prompt in ids:
            driver.add(prompt, 1)
        driver.run_until(lambda: all(request.finished for request in driver.requests), deadline=deadline)
        return time.perf_counter() - started
    finally:
        driver.clear()
