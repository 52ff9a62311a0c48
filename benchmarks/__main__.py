"""``python -m benchmarks``: measures the engine and its peers in one run, prints one table, draws one plot."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import models, offline, online, share, vllm_environment
from benchmarks.adapters import Settings
from benchmarks.bars import US, bar_table
from benchmarks.offline import Plan
from benchmarks.processes import ROOT, Engine
from benchmarks.results import RESULTS_FOLDER, ResultFile, Row, table
from benchmarks.workloads import HTTP_CONCURRENCY, OFFLINE_WORKLOADS

ENGINES = ("pagedserve", "transformers_cb", "padded_generate", "vllm_cpu")
WORKLOADS = ("mixed", "http", "gemma", "share", "greedy", "shared", "bookkeeping", "first_token")
"""In the order of importance: an interrupted run has the first of them."""
SERVERS = ("pagedserve", "vllm_cpu")
GEMMA_ENGINES = ("pagedserve", "transformers_cb", "vllm_cpu")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median counts")
    parser.add_argument("--model", type=Path, help="folder of safetensors; default: SmolLM2, converted once")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit-seconds", type=float, default=900, help="for one run, and for loading an engine")
    parser.add_argument(
        "--row-seconds", type=float, default=900, help="an engine that used these is not repeated further"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the work, once; written to quick.json")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    # Ended from outside, the engines' processes still have to be ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    repeats = 1 if options.quick else options.repeats
    folder = str(options.model or models.folder("small", options.dtype))
    settings = Settings(folder=folder, dtype=options.dtype, threads=options.threads, max_running=256)
    plan = Plan(
        settings=settings,
        repeats=repeats,
        quick=options.quick,
        limit_seconds=options.limit_seconds,
        row_seconds=options.row_seconds,
    )
    head = {"model": Path(folder).name, "dtype": options.dtype, "threads": options.threads}
    output = options.output or RESULTS_FOLDER / ("quick.json" if options.quick else "cpu.json")
    results = ResultFile(output, versions={"python": sys.version.split()[0]}, settings=head)
    engines = find_engines(options.engines, options.threads)
    try:
        measure(options.workloads, engines, plan, results)
    finally:
        print("\n" + table(results.rows) + "\n\n" + bar_table(results) + f"\n\n{output}")
    subprocess.run([sys.executable, "-m", "benchmarks.plot", str(output)], cwd=ROOT, check=True)


def measure(workloads: Sequence[str], engines: list[Engine], plan: Plan, results: ResultFile) -> None:
    """Measure the named workloads one after another; what each one finishes is on disk before the next begins."""
    parts: dict[str, Callable[[], None]] = {
        "bookkeeping": lambda: measure_bookkeeping(plan.repeats, results),
        "first_token": lambda: measure_first_token(plan, results),
        "share": lambda: share.measure(results),
        "gemma": lambda: measure_gemma(engines, plan, results),
        "http": lambda: measure_http(engines, plan, results),
    }
    # Workloads of one model share its engines' processes.
    small = {name: OFFLINE_WORKLOADS[name] for name in workloads if name in OFFLINE_WORKLOADS and name not in parts}
    for name in workloads:
        if name in parts:
            parts[name]()
        elif small:
            for row in small:
                results.forget(row)
            offline.measure(small, engines, plan, results)
            small = {}


def measure_gemma(engines: list[Engine], plan: Plan, results: ResultFile) -> None:
    """The second model, offline, with the engines that batch continuously."""
    results.forget("gemma")
    try:
        folder = models.folder("gemma", plan.settings.dtype)
    except models.NoModel as error:
        note = f"not compared: {error}"
        results.add(Row("gemma", name, "throughput", None, "tok/s", note=note) for name in GEMMA_ENGINES)
        return
    of_gemma = replace(plan, settings=replace(plan.settings, folder=str(folder)))
    chosen = [engine for engine in engines if engine.name in GEMMA_ENGINES]
    offline.measure({"gemma": OFFLINE_WORKLOADS["gemma"]}, chosen, of_gemma, results)


def measure_http(engines: list[Engine], plan: Plan, results: ResultFile) -> None:
    """Servers at growing concurrency."""
    for name in ("http", "memory", online.OFFLINE_ROW, *map(online.row_name, HTTP_CONCURRENCY)):
        results.forget(name)
    online.measure([engine for engine in engines if engine.name in SERVERS], plan, results)


def find_engines(names: Sequence[str], threads: int) -> list[Engine]:
    """The engines to run; one whose environment can't be made gets an interpreter that isn't there, and says so."""
    engines = []
    for name in names:
        if name != "vllm_cpu":
            engines.append(Engine(name=name))
            continue
        try:
            python = vllm_environment.ensure()
            engines.append(Engine(name=name, python=python, environment=vllm_environment.variables(threads)))
        except vllm_environment.NoEnvironment as error:
            print(f"vllm_cpu: not compared: {error}", file=sys.stderr)
    return engines


def measure_bookkeeping(repeats: int, results: ResultFile) -> None:
    """The no-op model in a process of its own, once for each repetition."""
    samples: dict[int, list[float]] = defaultdict(list)
    for repetition in range(repeats):
        command = [sys.executable, "-m", "benchmarks.bookkeeping"]
        lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
        for line in map(json.loads, lines.splitlines()):
            samples[line["running"]].append(line["median_ms"])
        print(f"  bookkeeping run {repetition + 1}/{repeats}", flush=True)
        results.add(Row.median(f"bookkeeping_{size}", US, "step", values, "ms") for size, values in samples.items())


def measure_first_token(plan: Plan, results: ResultFile) -> None:
    """A fresh clone to its first token, once: the packages' cache is warm."""
    command = [sys.executable, "-m", "benchmarks.first_token"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=plan.limit_seconds, check=False)
    if done.returncode:
        note = f"not measured: {offline.first_line(done.stderr[-300:])}"
        results.add([Row("fresh_clone", US, "first_token", None, "s", note=note)])
        return
    phases = json.loads(done.stdout.splitlines()[-1])
    results.add(Row.median("fresh_clone", US, name, [seconds], "s") for name, seconds in phases.items())


if __name__ == "__main__":
    main()
