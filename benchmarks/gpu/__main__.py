"""``python -m benchmarks.gpu``: the engine on a GPU against the card's limits and its peer, in at most eight minutes.

Needs no network and installs nothing. ``--tiny --device cpu`` runs every row in small on a CPU, to show that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bars import report, void_reason
from benchmarks.gpu.groups import GROUPS
from benchmarks.gpu.processes import GroupProcess, NoDevice
from benchmarks.gpu.scale import FULL, TINY
from benchmarks.results import RESULTS_FOLDER, ResultFile, Row, hardware, table

SPARE_SECONDS = 10.0
"""Kept for the table and the plot."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="which processes' rows")
    parser.add_argument("--seconds", type=float, default=470, help="for all of it; what doesn't fit is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: proves nothing; needs --output to be kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-<card>.json")
    parser.add_argument("--logs", type=Path, help="folder that keeps what each process says; default: none is kept")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    # Ended from outside, the processes still have to be ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="pagedserve-bench-") as folder:
        run = Run(options, Path(folder))
        try:
            run.measure()
        except NoDevice as error:
            print(f"{error}: give the interpreter of a torch with CUDA (make bench-gpu PYTHON=...), or try every row "
                  "in small with --tiny --device cpu", file=sys.stderr)  # fmt: skip
            return 1
        finally:
            if run.results is not None:
                print("\n" + table(run.results.rows) + "\n\n" + report(run.results) + f"\n\n{run.results.path}")
        return draw(run.results)


class Run:
    """One pass over the groups, one process at a time, the next one's imports under way."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.results: ResultFile | None = None
        self._options = options
        self._folder = folder
        self._deadline = time.monotonic() + options.seconds - SPARE_SECONDS

    def measure(self) -> None:
        """Every group that fits into the time. Raises NoDevice."""
        names = list(self._options.groups)
        with contextlib.ExitStack() as stack:
            processes = {names[0]: stack.enter_context(self._process(names[0]))}
            for at, name in enumerate(names):
                if name not in processes:
                    continue
                for after in names[at + 1 : at + 2]:
                    processes[after] = stack.enter_context(self._process(after))
                self._measure_group(name, processes[name])
                processes[name].close()

    def _process(self, name: str) -> GroupProcess:
        return GroupProcess(
            name,
            device=self._options.device,
            scale="tiny" if self._options.tiny else "full",
            folder=self._folder,
            logs=self._options.logs or self._folder / "logs",
        )

    def _measure_group(self, name: str, process: GroupProcess) -> None:
        group, left = GROUPS[name], self._deadline - time.monotonic()
        print(f"{time.strftime('%H:%M:%S')} {name}, {left:.0f} s left", flush=True)
        missing = {(workload, engine, metric): unit for workload, engine, metric, unit in group.rows}
        if left < group.least_seconds and not self._options.tiny:
            note = f"not measured: {max(0.0, left):.0f} s were left and it needs {group.least_seconds:.0f}"
            self._fill(missing, note)
            return
        for message in process.run(min(left, group.most_seconds), self._limits()):
            if "machine" in message:
                self._begin(message["machine"])
            else:
                row = Row(**message["row"])
                missing.pop((row.workload, row.engine, row.metric), None)
                self._add([row])
        self._fill(missing, process.ending)

    def _begin(self, machine: dict[str, Any]) -> None:
        """Open the results of this card; a run of all groups starts them anew."""
        if self.results is not None:
            return
        scale = TINY if self._options.tiny else FULL
        shapes = [scale.large.parent.name, scale.small.parent.name]
        self.results = ResultFile(
            self._output(machine["card"]),
            versions={"python": sys.version.split()[0], **machine.pop("versions")},
            settings={**scale.settings, "dtype": scale.dtype, "shapes": shapes},
            machine={**hardware(), **machine},
        )
        if set(self._options.groups) == set(GROUPS):
            self.results.rows = []

    def _output(self, card: str) -> Path:
        if self._options.output is not None:
            return Path(self._options.output)
        folder = self._folder if self._options.tiny else RESULTS_FOLDER
        return folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"

    def _limits(self) -> dict[str, float]:
        """What the rows are held against, in bytes and operations per second."""
        found = {
            "bandwidth": self.results.value("copy", "device", "bandwidth") if self.results else None,
            "product": self.results.value("product", "device", "rate") if self.results else None,
        }
        return {name: 1e12 * rate for name, rate in found.items() if rate}

    def _fill(self, missing: dict[tuple[str, str, str], str], note: str) -> None:
        self._add(
            Row(workload, engine, metric, None, unit, note=note) for (workload, engine, metric), unit in missing.items()
        )

    def _add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            said = f"{row.value:.4g} {row.unit}" if row.value is not None else ""
            print(f"  {time.strftime('%H:%M:%S')} {row.workload} {row.engine} {row.metric} {said} {row.note}".rstrip())
            if self.results is not None:
                self.results.head["void"] = void_reason(self.results)
                self.results.add([row])
        sys.stdout.flush()


def draw(results: ResultFile | None) -> int:
    """The plots, where matplotlib is there."""
    if results is None:
        return 1
    try:
        from benchmarks.plot import draw as draw_file
    except ImportError:
        print(f"no matplotlib here: draw later with python -m benchmarks.plot {results.path}")
        return 0
    print(*draw_file(results.path), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
