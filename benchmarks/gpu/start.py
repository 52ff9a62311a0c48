"""Time to ready of the large shape: first with empty caches of compiled artefacts, then with what that start left."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.bench import US
from benchmarks.gpu.driver import Driver
from benchmarks.results import Row

WEIGHTS = "weights"


def start(driver: Driver, which: str) -> Iterator[Row]:
    """``which`` start: all of it, by phase, and what comes after the weights."""
    phases: dict[str, float] = dict(getattr(driver.core, "phases", {}))
    yield Row("start_8b", US, f"{which}_total", driver.build_seconds, "s")
    for name, seconds in phases.items():
        yield Row("start_8b", US, f"{which}_{name.replace(' ', '_')}", seconds, "s")
    after = driver.build_seconds - phases[WEIGHTS] if WEIGHTS in phases else None
    note = "" if after is not None else "not compared: the core does not tell its phases"
    yield Row("start_8b", US, f"{which}_after_weights", after, "s", note=note)
