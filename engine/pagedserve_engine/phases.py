"""How long each part of a start takes: one line of the log, and what the profile and the benchmarks show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by phase, in the order in which they began; a phase that comes again adds up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time what runs inside; it counts also where it raises."""
        self.seconds.setdefault(name, 0.0)
        started = self._clock()
        try:
            yield
        finally:
            self.seconds[name] += self._clock() - started

    def describe(self) -> str:
        """All phases in one line: "12.3 s: weights 9.8 s, graphs 2.1 s"."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{self._clock() - self._began:.1f} s: {parts}"
