"""The card's own limits: the fastest of many copies, and of many large products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.results import Row

DEVICE = "device"


def measure(bench: Bench) -> None:
    """``copy`` in TB/s, read and written bytes counted; ``product`` of two square matrices in TFLOP/s."""
    bench.attempt("copy", "bandwidth", "TB/s", lambda: [_copies(bench)], engine=DEVICE)
    bench.attempt("product", "rate", "TFLOP/s", lambda: [_products(bench)], engine=DEVICE)


def _copies(bench: Bench) -> Row:
    source = torch.empty(bench.scale.copy_bytes, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    seconds = [_time(bench.device, lambda: target.copy_(source)) for _ in range(bench.scale.repeats)]
    rates = [2 * bench.scale.copy_bytes / value / 1e12 for value in seconds]
    return Row("copy", DEVICE, "bandwidth", max(rates), "TB/s", [round(rate, 4) for rate in rates], note="best counts")


def _products(bench: Bench) -> Row:
    """In bf16; on a CPU, which may have no products in it, in the faster of it and float32."""
    dtypes = [torch.bfloat16] if bench.device != "cpu" else [torch.bfloat16, torch.float32]
    fastest = max(dtypes, key=lambda dtype: max(_product_rates(bench, dtype, repeats=2)))
    rates = _product_rates(bench, fastest, repeats=bench.scale.repeats)
    return Row("product", DEVICE, "rate", max(rates), "TFLOP/s", [round(rate, 4) for rate in rates], note="best counts")


def _product_rates(bench: Bench, dtype: torch.dtype, *, repeats: int) -> list[float]:
    size = bench.scale.product
    left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    seconds = [_time(bench.device, lambda: torch.mm(left, right, out=out)) for _ in range(repeats)]
    return [2 * size**3 / value / 1e12 for value in seconds]


def _time(device: str, work: Callable[[], object]) -> float:
    """Seconds of ``work`` on the device's own clock."""
    if device == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
