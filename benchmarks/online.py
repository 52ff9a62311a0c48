"""Runs the HTTP workload: one server at a time, every concurrency, engines by turns at each repetition."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.bars import US
from benchmarks.offline import Plan, Samples, first_line, run, turned, warm_up
from benchmarks.processes import Engine, RunFailed, Worker, workers
from benchmarks.results import ResultFile, Row
from benchmarks.servers import Server, cache_bytes, serving, weight_bytes
from benchmarks.workloads import HTTP, HTTP_CONCURRENCY, OFFLINE_32, smaller

UNITS = {
    "throughput": "tok/s",
    "ttft_p50": "ms",
    "ttft_p99": "ms",
    "gap_p50": "ms",
    "gap_p99": "ms",
    "per_token_p50": "ms",
}
OFFLINE_ROW = "offline_32"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HttpSamples = dict[tuple[str, str], list[float]]
"""By (row name, metric)."""


def row_name(concurrency: int) -> str:
    """The workload's name in the results."""
    return f"http_{concurrency}"


def measure(engines: Sequence[Engine], plan: Plan, results: ResultFile) -> None:
    """Every engine's server at every concurrency; servers start once, and one that doesn't serve is stopped.

    This repository's engine is also run without HTTP, 32 at once, beside its server in each repetition.
    """
    print(f"http: {HTTP.description}", flush=True)
    samples: dict[str, HttpSamples] = {engine.name: defaultdict(list) for engine in engines}
    failures: dict[str, str] = {}
    ours = [engine for engine in engines if engine.name == US]
    alone = replace(plan.settings, max_running=OFFLINE_32.max_running)
    with contextlib.ExitStack() as stack:
        servers = {engine.name: _start(engine, plan, stack, samples[engine.name], failures) for engine in engines}
        started = stack.enter_context(workers(ours, alone, limit_seconds=plan.limit_seconds))
        beside = Samples()
        for repetition in range(plan.repeats):
            for name in turned(list(servers), repetition):
                _measure_server(servers[name], repetition, plan, samples[name], failures)
                results.add(_rows(name, samples[name], failures.get(name, "")))
            for name, worker in started.items():
                _measure_offline(worker, repetition, plan, beside)
                results.add(beside.rows(OFFLINE_ROW, name))
        results.add(memory_row(engine.name, samples[engine.name], plan) for engine in ours)


def _start(
    engine: Engine, plan: Plan, stack: contextlib.ExitStack, samples: HttpSamples, failures: dict[str, str]
) -> Server | None:
    try:
        server = stack.enter_context(serving(engine, plan.settings, limit_seconds=plan.limit_seconds))
        server.load(concurrency=8, repetition=-1, count=8, quick=plan.quick, limit_seconds=plan.limit_seconds)
    except RunFailed as error:
        failures[engine.name] = str(error)
        print(f"  {engine.name}: not compared: {first_line(str(error))}", flush=True)
        return None
    server.process.signal(signal.SIGSTOP)
    samples["http", "server_start"].append(server.start_seconds)
    print(f"  {engine.name}: ready after {server.start_seconds:.1f} s", flush=True)
    return server


def _measure_server(
    server: Server | None, repetition: int, plan: Plan, samples: HttpSamples, failures: dict[str, str]
) -> None:
    if server is None or server.engine in failures:
        return
    server.process.signal(signal.SIGCONT)
    try:
        _run_all(server, repetition, plan, samples)
    except RunFailed as error:
        failures[server.engine] = str(error)
        print(f"  {server.engine}: {first_line(str(error))}", flush=True)
    finally:
        server.process.signal(signal.SIGSTOP)


def _measure_offline(worker: Worker | str, repetition: int, plan: Plan, samples: Samples) -> None:
    if isinstance(worker, str):
        samples.failure = worker
        return
    workload = smaller(OFFLINE_32) if plan.quick else OFFLINE_32
    if repetition == 0:
        warm_up(worker, workload, samples, plan)
    run(worker, workload, repetition, samples, plan)


def _run_all(server: Server, repetition: int, plan: Plan, samples: HttpSamples) -> None:
    workload = smaller(HTTP) if plan.quick else HTTP
    for concurrency in HTTP_CONCURRENCY:
        count = max(4, min(workload.count, 2 * concurrency))
        # Another concurrency must not find the prompts of the last one in the prefix cache.
        seed = repetition if concurrency == max(HTTP_CONCURRENCY) else 1_000 * concurrency + repetition
        figures = server.load(
            concurrency=concurrency, repetition=seed, count=count, quick=plan.quick, limit_seconds=plan.limit_seconds
        )
        for metric in UNITS:
            samples[row_name(concurrency), metric].append(figures[metric])
        run = f"{time.strftime('%H:%M:%S')} run {repetition + 1}/{plan.repeats} {server.engine:16}"
        said = f"{figures['throughput']:8.1f} tok/s, TTFT p50 {figures['ttft_p50']:.0f} ms"
        print(f"  {run} {concurrency:2} clients {said}", flush=True)
    samples["http", "resident"].append(server.resident_bytes())


def _rows(engine: str, samples: HttpSamples, failure: str) -> list[Row]:
    if not samples:
        note = f"not compared: {first_line(failure)}"
        return [Row(row_name(count), engine, "throughput", None, "tok/s", note=note) for count in HTTP_CONCURRENCY]
    names = [row_name(count) for count in HTTP_CONCURRENCY]
    rows = [
        Row.median(name, engine, metric, samples[name, metric], unit)
        for name in names
        for metric, unit in UNITS.items()
    ]
    return [*rows, Row.median("http", engine, "server_start", samples["http", "server_start"], "s")]


def memory_row(engine: str, samples: HttpSamples, plan: Plan) -> Row:
    """Resident memory above weights and cache, after load."""
    size = DTYPE_BYTES[plan.settings.dtype]
    known = weight_bytes(plan.settings.folder, size) + cache_bytes(
        plan.settings.folder, plan.settings.cache_tokens, size
    )
    above = [(resident - known) / 2**30 for resident in samples["http", "resident"]]
    return Row.median("memory", engine, "resident_above_weights_and_cache", above, "GiB")
