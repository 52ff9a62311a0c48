"""How near decoding on this CPU comes to what its memory and its products allow, in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.groups import SHARE
from benchmarks.gpu.processes import GroupProcess
from benchmarks.results import ResultFile, Row


def measure(results: ResultFile) -> None:
    """Every batch size once, each the median of its windows; saved one by one."""
    missing = {row[:3]: row[3] for row in SHARE.rows}
    with tempfile.TemporaryDirectory(prefix="pagedserve-bench-") as folder:
        process = GroupProcess("share", device="cpu", scale="cpu", folder=Path(folder), logs=Path(folder) / "logs")
        with process:
            for row in _rows(process):
                missing.pop((row.workload, row.engine, row.metric), None)
                results.add([row])
    note = process.ending
    results.add(
        Row(workload, engine, metric, None, unit, note=note) for (workload, engine, metric), unit in missing.items()
    )


def _rows(process: GroupProcess) -> Iterator[Row]:
    for message in process.run(SHARE.most_seconds, {}):
        if "row" in message:
            row = Row(**message["row"])
            said = "" if row.value is None else f"{row.value:.4g} {row.unit}"
            print(f"  {row.workload} {row.metric} {said} {row.note}".rstrip(), flush=True)
            yield row
