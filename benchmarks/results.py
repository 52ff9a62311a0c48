"""Flat rows of what was measured, and the file that holds them with the machine and the versions they hold for."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS_FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: the median of ``samples``; without a value the measurement did not run, and ``note`` says why."""

    workload: str
    engine: str
    metric: str
    value: float | None
    unit: str
    samples: list[float] = field(default_factory=list)
    note: str = ""

    @classmethod
    def median(cls, workload: str, engine: str, metric: str, samples: Sequence[float], unit: str) -> Row:
        """The row of ``samples``, one for each repetition; without any, a row that is not compared."""
        if not samples:
            return cls(workload, engine, metric, None, unit, note="not compared")
        return cls(workload, engine, metric, statistics.median(samples), unit, [round(sample, 4) for sample in samples])


class ResultFile:
    """Rows on disk, written whole after each change, so that an interrupted run keeps what was done."""

    def __init__(
        self,
        path: Path,
        *,
        versions: dict[str, str],
        settings: dict[str, Any],
        machine: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.head: dict[str, Any] = {
            "hardware": hardware() if machine is None else machine,
            "versions": versions,
            "settings": settings,
        }
        self.rows: list[Row] = []
        if path.exists():
            self._take_over(json.loads(path.read_text()))

    def _take_over(self, stored: dict[str, Any]) -> None:
        # Figures of another machine or of other settings say nothing beside today's.
        if stored.get("hardware") == self.head["hardware"] and stored.get("settings") == self.head["settings"]:
            self.rows = [Row(**row) for row in stored["rows"]]
            # Of the engines whose rows stay; this run's own are newer.
            self.head["versions"] = {**stored.get("versions", {}), **self.head["versions"]}

    def forget(self, workload: str) -> None:
        """Drop the rows of a workload that is about to be measured for all its engines."""
        self.rows = [row for row in self.rows if row.workload != workload]

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in the place of earlier ones of the same figure, and save."""
        for row in rows:
            same = (row.workload, row.engine, row.metric)
            self.rows = [old for old in self.rows if (old.workload, old.engine, old.metric) != same] + [row]
        self.save()

    def save(self) -> None:
        """Write the file; a reader sees the old or the new one, never a part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.head, "rows": [dataclasses.asdict(row) for row in self.rows]}, indent=1)
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)

    def value(self, workload: str, engine: str, metric: str) -> float | None:
        """A figure, or None where it was not measured."""
        for row in self.rows:
            if (row.workload, row.engine, row.metric) == (workload, engine, metric):
                return row.value
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and the instruction sets that decide the speed of bf16."""
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    lines = [line.partition(":") for line in text.split("\n\n", 1)[0].splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}),
        "system": f"{platform.system()} {platform.machine()}",
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as text in columns; an empty value is shown as its note."""
    head = ("workload", "engine", "metric", "median", "unit", "runs")
    lines = [head] + [
        (row.workload, row.engine, row.metric, _figure(row), row.unit if row.value is not None else "", _runs(row))
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def _figure(row: Row) -> str:
    if row.value is None:
        return row.note or "not compared"
    return f"{row.value:,.0f}" if abs(row.value) >= 1_000 else f"{row.value:.4g}"


def _runs(row: Row) -> str:
    return str(len(row.samples)) if row.samples else ""
