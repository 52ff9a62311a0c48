"""The engine's own command line, with a core that fails: a fault, its number of rows, then the arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pagedserve_engine import assembly
from pagedserve_engine.__main__ import main
from pagedserve_engine.batch import Batch, PendingStep
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import DeviceFailedError, OutOfDeviceMemoryError
from pagedserve_engine.processor import Runner


class FaultyRunner:
    """Runs steps as ``inner`` does until one has ``rows`` rows; ``fault`` decides what becomes of it and all later."""

    def __init__(self, inner: Runner, fault: Callable[[Batch], None], rows: int) -> None:
        self._inner = inner
        self._fault = fault
        self._rows = rows
        self._faulty = False

    def launch(self, batch: Batch) -> PendingStep:
        self._faulty = self._faulty or len(batch.requests) >= self._rows
        if self._faulty:
            self._fault(batch)
        return self._inner.launch(batch)


class Faults:
    """What can go wrong in a step; each name is a fault's."""

    def __init__(self) -> None:
        self._failed = False

    def step(self, batch: Batch) -> None:
        """Once."""
        if not self._failed:
            self._failed = True
            raise RuntimeError("a kernel went wrong")

    def memory(self, batch: Batch) -> None:
        """However small the step."""
        raise OutOfDeviceMemoryError("out of memory")

    def large_steps(self, batch: Batch) -> None:
        """Memory suffices for two tokens."""
        if batch.num_tokens > 2:
            raise OutOfDeviceMemoryError("out of memory")

    def device(self, batch: Batch) -> None:
        raise DeviceFailedError("the device failed: unspecified launch failure\nsecond line")

    def bug(self, batch: Batch) -> None:
        """In the bookkeeping: the batch that comes back is not the one that went."""
        batch.requests.clear()


def run(fault: str, rows: int, arguments: list[str]) -> int:
    """Serve with that fault."""
    real = assembly.build_core

    def build(config: EngineConfig) -> assembly.Core:
        core = real(config)
        core.processor._runner = FaultyRunner(core.processor._runner, getattr(Faults(), fault), rows)
        return core

    assembly.build_core = build
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
