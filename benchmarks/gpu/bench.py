"""What the rows of one process share: the scale, the clock, and where a figure goes as soon as it is there."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.scale import Scale
from benchmarks.results import Row

US = "pagedserve"


class TimeOver(Exception):
    """A measurement did not end within its time."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Handed to every row."""

    scale: Scale
    device: str
    """cpu or cuda"""
    folder: Path
    """For caches of compiled artefacts; empty when the run began."""
    deadline: float
    """Monotonic seconds at which the process is ended."""
    report: Callable[[Row], None]
    limits: Mapping[str, float] = field(default_factory=dict)
    """``bandwidth`` in bytes per second and ``product`` in FLOP per second, where they were measured."""

    def seconds_left(self) -> float:
        """Until the process is ended."""
        return self.deadline - time.monotonic()

    def attempt(
        self, workload: str, metric: str, unit: str, measure: Callable[[], Iterable[Row]], *, engine: str = US
    ) -> None:
        """Report the rows of ``measure`` one by one; without the named one, an empty row with the reason."""
        reported = set()
        try:
            for row in measure():
                reported.add(row.metric)
                self.report(row)
        except Exception as error:
            if not said_plainly(error):
                traceback.print_exc()
            if metric not in reported:
                self.report(Row(workload, engine, metric, None, unit, note=reason(error)))


def said_plainly(error: Exception) -> bool:
    """Whether the message alone explains it: a setting that is refused, a time that is over."""
    return isinstance(error, TimeOver) or type(error).__module__.startswith("pagedserve_engine")


def reason(error: Exception) -> str:
    """Why there is no figure, short enough for a table."""
    text = " ".join(str(error).split())[:200]
    return f"not compared: {text}" if said_plainly(error) else f"failed: {type(error).__name__}: {text}"
