"""What prometheus_client lacks: a queue's current wait, and a histogram that takes equal observations at once."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import fsum
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class QueueWait:
    """How long requests wait now: the larger of the recent mean and the age of the oldest that still waits.

    The mean alone forgets those that are stuck; the oldest alone forgets a burst that has just been admitted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, window: float = 30.0) -> None:
        self._clock = clock
        self._window = window
        self._waits: deque[tuple[float, float]] = deque()
        self._lock = Lock()

    def observe(self, seconds: float) -> None:
        """Note that a request left the queue after ``seconds``."""
        with self._lock:
            self._forget()
            self._waits.append((self._clock(), seconds))

    def value(self, oldest_age: float) -> float:
        """Seconds; ``oldest_age`` is 0 where nothing waits."""
        with self._lock:
            self._forget()
            mean = fsum(wait for _, wait in self._waits) / len(self._waits) if self._waits else 0.0
        return max(mean, oldest_age)

    def _forget(self) -> None:
        horizon = self._clock() - self._window
        while self._waits and self._waits[0][0] < horizon:
            self._waits.popleft()


class WeightedHistogram(Collector):
    """A histogram that takes many equal observations at once: the rows of a step share one inter-token gap."""

    def __init__(self, name: str, documentation: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._lock = Lock()
        registry.register(self)

    def observe(self, amount: float, count: int = 1) -> None:
        """Add ``amount``, ``count`` times."""
        index = bisect_left(self._bounds, amount)
        with self._lock:
            self._counts[index] += count
            self._sum += amount * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The histogram as Prometheus wants it: cumulative counts."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(counts), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)
