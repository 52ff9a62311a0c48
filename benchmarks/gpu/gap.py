"""How long the device does nothing between two steps, read off the profiler's timeline."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.bench import US, Bench
from benchmarks.gpu.decode import ROW_SECONDS, bounds
from benchmarks.gpu.driver import WARM_STEPS, Driver
from benchmarks.results import Row

STEP = "benchmark step"
KERNELS = frozenset({"kernel"})
COPIES = frozenset({"gpu_memcpy", "gpu_memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
Event = Mapping[str, Any]
"""Of a Chrome trace: ts and dur in microseconds."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Microseconds for each step boundary, and the device's idle time in a step."""

    between: list[float]
    """From the end of a step's last kernel to the start of the next step's first."""
    idle: float
    """On average, copies counted as work."""


def gap(bench: Bench, driver: Driver, batch: int) -> Iterator[Row]:
    """Between steps of ``batch`` decoding rows; also the step's own time, measured before the profiler starts."""
    scale = bench.scale
    steps = scale.gap_steps
    deadline = time.monotonic() + min(ROW_SECONDS, bench.seconds_left())
    tokens = max(1, scale.context - steps)
    most = 3 * steps + batch + 3 * WARM_STEPS
    with driver.decoding(batch, tokens=tokens, max_tokens=most, contents="gap", deadline=deadline):
        before = driver.context
        samples = driver.step_seconds(windows=1, steps=steps)
        context = (before + driver.context) / 2
        events = _trace(bench, driver, steps)
    yield Row.median("gap_256", US, "step", [1e3 * sample for sample in samples], "ms")
    yield Row.median("gap_256", US, "throughput", [batch / sample for sample in samples], "tok/s")
    yield from bounds(bench, "gap_256", [1e3 * sample for sample in samples], (batch, context))
    found = find_gaps(events) if bench.device != "cpu" else find_gaps(as_device(events))
    yield Row.median("gap_256", US, "gap", [value / 1e3 for value in found.between], "ms")
    yield Row("gap_256", US, "idle", found.idle / 1e3, "ms", note="of a step, on average")


def _trace(bench: Bench, driver: Driver, steps: int) -> list[Event]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device != "cpu" else [])
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(WARM_STEPS // 2 + steps):
            with record_function(STEP):
                driver.step()
        if bench.device != "cpu":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[Event] = json.loads(file.read_text())["traceEvents"]
    return events


def find_gaps(events: Iterable[Event]) -> Gaps:
    """Kernels belong to the step during which the host launched them; raises ValueError where there are none."""
    spans = [event for event in events if event.get("ph") == "X"]
    steps = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["name"] == STEP)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in spans
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    kernels: list[list[tuple[float, float]]] = [[] for _ in steps]
    busy: list[tuple[float, float]] = []
    for event in spans:
        if event.get("cat") not in KERNELS | COPIES:
            continue
        at = launched.get(event.get("args", {}).get("correlation"))
        step = None if at is None else next((i for i, (start, end) in enumerate(steps) if start <= at <= end), None)
        busy.append((event["ts"], event["ts"] + event["dur"]))
        if step is not None and event["cat"] in KERNELS:
            kernels[step].append(busy[-1])
    ran = [sorted(step) for step in kernels if step]
    if len(ran) < 2:
        raise ValueError("the profiler saw no kernels of two steps")
    between = [max(0.0, after[0][0] - max(end for _, end in before)) for before, after in pairwise(ran)]
    return Gaps(between, idle_time(busy) / len(ran))


def idle_time(busy: Sequence[tuple[float, float]]) -> float:
    """What (start, end) pairs leave uncovered between the first start and the last end."""
    idle, reached = 0.0, min(start for start, _ in busy)
    for start, end in sorted(busy):
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle


def as_device(events: Iterable[Event]) -> list[Event]:
    """A CPU's operators in the place of kernels, launched when they begin."""
    stand_ins: list[Event] = []
    for number, event in enumerate(events):
        stand_ins.append(event)
        if event.get("cat") == "cpu_op":
            of = {"ts": event["ts"], "ph": "X", "args": {"correlation": number}}
            stand_ins.append({**of, "name": event["name"], "cat": "kernel", "dur": event["dur"]})
            stand_ins.append({**of, "name": "launch", "cat": "cuda_runtime", "dur": 0})
    return stand_ins
