"""The operator's own instruments, on a registry of their own, so that two operators may live in one process."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pagedserve_operator.names import Key

RECONCILE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

METRICS_API_STATES = ("off", "starting", "serving", "foreign", "troubled")

Conditions = Iterable[Mapping[str, str]]


class Queue(Protocol):
    """What is shown of a work queue."""

    def __len__(self) -> int:
        """Keys that wait."""

    @property
    def oldest_seconds(self) -> float:
        """How long the first has waited."""


class Metrics:
    """Every instrument; what can be read when asked is read when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "pagedserve_operator_reconciles",
            "Looks at one resource, by result: unchanged, changed, refused (the resource or a child can't be), retry",
            ["result"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "pagedserve_operator_reconcile_seconds",
            "Duration of one look at one resource",
            buckets=RECONCILE_SECONDS,
            registry=self.registry,
        )
        self.api_calls = Counter(
            "pagedserve_operator_api_calls",
            "Answers of the API server by verb and status code; code 0: no answer",
            ["verb", "code"],
            registry=self.registry,
        )
        self._answers = Counter(
            "pagedserve_operator_metrics_api_requests",
            "Requests to the custom metrics API by status code",
            ["code"],
            registry=self.registry,
        )
        self._reads = Counter(
            "pagedserve_operator_engine_reads",
            "Reads of one engine's metrics by result: read, failed (no answer in time, or none that can be used)",
            ["result"],
            registry=self.registry,
        )

    def metrics_api_answered(self, code: int) -> None:
        """A request to the custom metrics API was answered with this status code."""
        self._answers.labels(str(code)).inc()

    def engine_read(self, result: str) -> None:
        """An engine's metrics were read, or could not be: read, failed."""
        self._reads.labels(result).inc()

    def show(
        self,
        *,
        queue: Queue,
        ages: Callable[[], Mapping[str, float]],
        leading: Callable[[], bool],
        clock_ahead: Callable[[], float] = lambda: 0.0,
        metrics_api: Callable[[], str] = lambda: "off",
    ) -> Resources:
        """Register what lives elsewhere; returns the place where resources are counted."""
        resources = Resources()
        self.registry.register(_Live(queue, ages, leading, resources))
        self.registry.register(_MetricsApi(clock_ahead, metrics_api))
        return resources


class Resources:
    """Conditions of every resource, as last reported."""

    def __init__(self) -> None:
        self._conditions: dict[Key, tuple[tuple[str, str], ...]] = {}

    def __len__(self) -> int:
        """Resources that are known."""
        return len(self._conditions)

    def keys(self) -> tuple[Key, ...]:
        """Those resources."""
        return tuple(self._conditions)

    def report(self, key: Key, conditions: Conditions) -> None:
        """The resource's conditions are these now."""
        self._conditions[key] = tuple((condition["type"], condition["status"]) for condition in conditions)

    def forget(self, key: Key) -> None:
        """The resource is no more."""
        self._conditions.pop(key, None)

    def tally(self) -> Mapping[tuple[str, str], int]:
        """Resources by (condition, status)."""
        return Tally(pair for pairs in self._conditions.values() for pair in pairs)


class _Live(Collector):
    def __init__(
        self,
        queue: Queue,
        ages: Callable[[], Mapping[str, float]],
        leading: Callable[[], bool],
        resources: Resources,
    ) -> None:
        self._queue = queue
        self._ages = ages
        self._leading = leading
        self._resources = resources

    def collect(self) -> Iterator[Metric]:
        """Values of this moment."""
        yield _gauge("pagedserve_operator_queue_depth", "Resources that wait for a look", len(self._queue))
        yield _gauge(
            "pagedserve_operator_queue_oldest_seconds", "How long the first has waited", self._queue.oldest_seconds
        )
        yield _gauge("pagedserve_operator_leading", "1 where this process writes", float(self._leading()))
        watches = GaugeMetricFamily(
            "pagedserve_operator_watch_event_age_seconds",
            "Since the last event, bookmark or reconnection of a kind's watch",
            labels=["kind"],
        )
        for kind, age in self._ages().items():
            watches.add_metric([kind], age)
        yield watches
        resources = GaugeMetricFamily(
            "pagedserve_operator_resources",
            "InferenceServices by condition, as the process that writes last reported them",
            labels=["condition", "status"],
        )
        # One that no longer leads would tell of the past.
        for pair, number in self._resources.tally().items() if self._leading() else ():
            resources.add_metric(list(pair), number)
        yield resources


class _MetricsApi(Collector):
    def __init__(self, clock_ahead: Callable[[], float], state: Callable[[], str]) -> None:
        self._clock_ahead = clock_ahead
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Values of this moment."""
        yield _gauge(
            "pagedserve_operator_clock_ahead_seconds",
            "How far the API server's clock is ahead of this process's; certificates are made by the API server's",
            self._clock_ahead(),
        )
        states = GaugeMetricFamily(
            "pagedserve_operator_metrics_api",
            "1 for the state of the custom metrics API here: off, starting, serving, foreign (somebody else serves "
            "it), troubled",
            labels=["state"],
        )
        for state in METRICS_API_STATES:
            states.add_metric([state], float(state == self._state()))
        yield states


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
