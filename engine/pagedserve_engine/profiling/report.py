"""The profile as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedserve_engine.profiling.load import Load
from pagedserve_engine.profiling.timeline import Part, Timeline

_SMALLEST_SHARE = 0.002
"""Parts below it are summed up in one line."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the profiler saw of one load."""

    load: Load
    plain_seconds: float
    """Of a step, without the profiler."""
    num_generated: int
    timeline: Timeline
    trace: str
    """Name of the file with the timeline."""

    @property
    def tokens_per_second(self) -> float:
        """Output tokens, at the step's true time."""
        return self.num_generated / self.timeline.num_steps / self.plain_seconds


def render_start(seconds: float, phases: Mapping[str, float]) -> str:
    """Time to ready, by phase."""
    rows = [(name, f"{value:.2f} s", _percent(value, seconds)) for name, value in phases.items()]
    rest = seconds - sum(phases.values())
    if phases:
        rows.append(("other", f"{rest:.2f} s", _percent(rest, seconds)))
    return _table([("time to ready", "seconds", "share"), *rows, ("all", f"{seconds:.2f} s", "100.0 %")])


def render_load(report: LoadReport) -> str:
    """Where a step's time goes."""
    timeline = report.timeline
    step = 1e3 * timeline.seconds / timeline.num_steps
    head = (
        f"{report.load.name}: {report.load.description}\n"
        f"a step takes {1e3 * report.plain_seconds:.2f} ms ({report.tokens_per_second:,.0f} tokens/s), "
        f"{step:.2f} ms under the profiler, {timeline.num_steps} of them in {report.trace}"
    )
    tables = [_parts_table("host" if timeline.device else "part of a step", timeline.host, timeline)]
    if timeline.device:
        tables.append(_parts_table("device", timeline.device, timeline))
    return "\n\n".join([head, *tables])


def to_json(
    reports: Sequence[LoadReport], *, head: Mapping[str, object], start_seconds: float, phases: Mapping[str, float]
) -> dict[str, Any]:
    """The figures as plain data; seconds and calls of a part are of all recorded steps together."""
    return {
        **head,
        "start": {"seconds": start_seconds, "phases": dict(phases)},
        "loads": [
            {
                "name": report.load.name,
                "batch": report.load.batch,
                "context": report.load.context,
                "step_seconds": report.plain_seconds,
                "tokens_per_second": report.tokens_per_second,
                "recorded_steps": report.timeline.num_steps,
                "recorded_seconds": report.timeline.seconds,
                "host": [_part(part) for part in report.timeline.host],
                "device": [_part(part) for part in report.timeline.device],
                "trace": report.trace,
            }
            for report in reports
        ],
    }


def _part(part: Part) -> dict[str, Any]:
    return {"part": part.name, "seconds": part.seconds, "calls": part.calls}


def _parts_table(title: str, parts: Sequence[Part], timeline: Timeline) -> str:
    large = [part for part in parts if part.seconds >= _SMALLEST_SHARE * timeline.seconds]
    small = [part for part in parts if part not in large]
    if small:
        rest = Part(f"{len(small)} smaller", sum(p.seconds for p in small), sum(p.calls for p in small))
        large.append(rest)
    rows = [
        (
            part.name,
            f"{1e3 * part.seconds / timeline.num_steps:.3f}",
            _percent(part.seconds, timeline.seconds),
            f"{part.calls / timeline.num_steps:.1f}",
        )
        for part in large
    ]
    return _table([(title, "ms/step", "share", "calls/step"), *rows])


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
