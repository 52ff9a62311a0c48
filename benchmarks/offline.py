"""Runs offline workloads: every engine loaded at once, one runs at a time, the order turned at each repetition."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.adapters import Settings
from benchmarks.processes import Engine, RunFailed, Worker, workers
from benchmarks.results import ResultFile, Row
from benchmarks.workloads import Workload, smaller


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    settings: Settings
    repeats: int
    quick: bool
    limit_seconds: float
    """For one run, and for loading."""
    row_seconds: float
    """An engine whose runs of one workload took this long is not run again for it."""


@dataclass(slots=True)
class Samples:
    """What one engine did in one workload."""

    throughput: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    prompt_tokens_computed: list[float] = field(default_factory=list)
    failure: str = ""

    def take(self, answer: dict[str, Any]) -> None:
        """Add a run."""
        self.seconds.append(answer["seconds"])
        self.throughput.append(sum(answer["output_lens"]) / answer["seconds"])
        if answer["prompt_tokens_computed"] is not None:
            self.prompt_tokens_computed.append(answer["prompt_tokens_computed"])

    def rows(self, workload: str, engine: str) -> list[Row]:
        """The figures so far; without a single run, one row that says why."""
        if not self.seconds:
            return [
                Row(workload, engine, "throughput", None, "tok/s", note=f"not compared: {first_line(self.failure)}")
            ]
        rows = [
            Row.median(workload, engine, "throughput", self.throughput, "tok/s"),
            Row.median(workload, engine, "duration", self.seconds, "s"),
        ]
        if self.prompt_tokens_computed:
            computed = self.prompt_tokens_computed
            rows.append(Row.median(workload, engine, "prompt_tokens_computed", computed, "tokens"))
        return rows


def turned(names: Sequence[str], repetition: int) -> list[str]:
    """Forwards and backwards by turns, so that no engine is always the one after the same other."""
    return list(names) if repetition % 2 == 0 else list(reversed(names))


def measure(workloads: dict[str, Workload], engines: Sequence[Engine], plan: Plan, results: ResultFile) -> None:
    """Measure the workloads (by row name) for all engines and save after every run."""
    with workers(engines, plan.settings, limit_seconds=plan.limit_seconds) as started:
        for worker in started.values():
            if isinstance(worker, Worker):
                results.head["versions"].update(worker.versions)
        for row_name, workload in workloads.items():
            chosen = smaller(workload) if plan.quick else workload
            _measure_one(row_name, chosen, started, plan, results)


def _measure_one(
    row_name: str, workload: Workload, started: dict[str, Worker | str], plan: Plan, results: ResultFile
) -> None:
    print(f"{row_name}: {workload.description}", flush=True)
    samples = {name: Samples() for name in started}
    for name, worker in started.items():
        if isinstance(worker, str):
            samples[name].failure = worker
        else:
            warm_up(worker, workload, samples[name], plan)
        results.add(samples[name].rows(row_name, name))
    for repetition in range(plan.repeats):
        for name in turned(list(started), repetition):
            worker = started[name]
            if isinstance(worker, Worker) and _wanted(samples[name], plan):
                run(worker, workload, repetition, samples[name], plan)
                results.add(samples[name].rows(row_name, name))


def _wanted(samples: Samples, plan: Plan) -> bool:
    return not samples.failure and sum(samples.seconds) < plan.row_seconds


def warm_up(worker: Worker, workload: Workload, samples: Samples, plan: Plan) -> None:
    """A few of the requests with contents of their own: compiles what the sizes of this workload need."""
    try:
        worker.run(workload.requests(-1, min(8, workload.count)), limit_seconds=plan.limit_seconds)
    except RunFailed as error:
        samples.failure = str(error)
        print(f"  {worker.engine.name}: {first_line(samples.failure)}", flush=True)


def run(worker: Worker, workload: Workload, repetition: int, samples: Samples, plan: Plan) -> None:
    """One run with its line of progress; a failure is kept in ``samples``."""
    clock = time.strftime("%H:%M:%S")
    try:
        samples.take(worker.run(workload.requests(repetition), limit_seconds=plan.limit_seconds))
        said = f"{samples.throughput[-1]:8.1f} tok/s in {samples.seconds[-1]:.1f} s"
    except RunFailed as error:
        samples.failure = str(error)
        said = first_line(samples.failure)
    print(f"  {clock} run {repetition + 1}/{plan.repeats} {worker.engine.name:16} {said}", flush=True)


def first_line(text: str) -> str:
    """What fits into a table."""
    return text.strip().splitlines()[0][:160] if text.strip() else "not run"
