"""Values of a metric for the pods of a namespace: who is alive now, by the API server, and what each one says now."""

from __future__ import annotations

from functools import partial
from typing import Final, Protocol

from pagedserve_operator.errors import ApiError, Rejected
from pagedserve_operator.metrics_api.answers import Answers
from pagedserve_operator.metrics_api.pods import ENGINES, Engine, live_engines
from pagedserve_operator.metrics_api.refusals import BadRequest, NotAvailable, NotFound
from pagedserve_operator.metrics_api.scraping import Scraper
from pagedserve_operator.metrics_api.values import Value
from pagedserve_operator.spec import Json

ALL: Final = "*"
"""In place of a pod's name."""
KEPT_SECONDS: Final = 1.0
MOST_LISTS: Final = 4_000


class Pods(Protocol):
    """Where pods are listed."""

    async def list(self, kind: str, namespace: str | None = None, *, selector: str | None = None) -> list[Json]:
        """Objects of the kind that ``selector`` selects; raises ApiError."""


class Reader:
    """Reads each engine, and lists each selection of pods, at most once in a second."""

    def __init__(self, pods: Pods, scraper: Scraper) -> None:
        self._pods = pods
        self._scraper = scraper
        self._engines: Answers[tuple[str, str], tuple[Engine, ...]] = Answers(
            seconds=lambda _: KEPT_SECONDS, most=MOST_LISTS
        )

    async def close(self) -> None:
        """Stop reading."""
        await self._engines.close()
        await self._scraper.close()

    async def values(self, namespace: str, pod: str, metric: str, *, selector: str) -> tuple[Value, ...]:
        """Of one pod, or of ALL that the label selector selects; pods that don't answer are missing.

        Raises BadRequest for a selector that can't be, NotFound for a named pod without value, NotAvailable.
        """
        engines = await self._list(namespace, selector)
        if pod != ALL:
            engines = tuple(engine for engine in engines if engine.name == pod)
        readings = await self._scraper.read(engines)
        values = tuple(
            Value(pod=name, number=reading.numbers[metric], at=reading.at)
            for name, reading in readings.items()
            if metric in reading.numbers
        )
        if pod != ALL and not values:
            why = "it doesn't answer" if engines else "no ready engine of an InferenceService has that name"
            raise NotFound(f"{metric} of pod {namespace}/{pod}: {why}")
        return values

    async def _list(self, namespace: str, selector: str) -> tuple[Engine, ...]:
        try:
            return await self._engines.get((namespace, selector), partial(self._live, namespace, selector))
        except Rejected as error:
            if error.status == 400:
                raise BadRequest(f"labelSelector {selector!r}: {error}") from error
            raise NotAvailable(f"pods of namespace {namespace} can't be listed: {error}") from error
        except ApiError as error:
            raise NotAvailable(f"pods of namespace {namespace} can't be listed: {error}") from error

    async def _live(self, namespace: str, selector: str) -> tuple[Engine, ...]:
        both = f"{selector},{ENGINES}" if selector else ENGINES
        return live_engines(await self._pods.list("Pod", namespace, selector=both))
