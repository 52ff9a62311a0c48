from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest

from metrics_world import engine_pod as pod
from pagedserve_operator.errors import ApiError, Rejected, Unavailable
from pagedserve_operator.metrics_api.pods import ENGINES, Engine
from pagedserve_operator.metrics_api.reader import Reader
from pagedserve_operator.metrics_api.refusals import BadRequest, NotAvailable, NotFound
from pagedserve_operator.metrics_api.values import Reading, Value

WAITING, RUNNING = "pagedserve_requests_waiting", "pagedserve_requests_running"
AT = datetime(2026, 6, 1, tzinfo=UTC)


class Pods:
    """An API server with these pods; what was asked for is kept."""

    def __init__(self, *pods: dict[str, Any], failure: ApiError | None = None) -> None:
        self.pods = pods
        self.failure = failure
        self.asked: list[tuple[str, str | None, str | None]] = []

    async def list(
        self, kind: str, namespace: str | None = None, *, selector: str | None = None
    ) -> list[dict[str, Any]]:
        self.asked.append((kind, namespace, selector))
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return list(self.pods)


class Scraper:
    """Readings by pod's name; who has none doesn't answer."""

    def __init__(self, **numbers: dict[str, float]) -> None:
        self.numbers = numbers

    async def read(self, engines: Iterable[Engine]) -> dict[str, Reading]:
        return {
            engine.name: Reading(self.numbers[engine.name], AT) for engine in engines if engine.name in self.numbers
        }

    async def close(self) -> None:
        """Nothing is open."""


def values(pods: Pods, scraper: Scraper, name: str = "*", metric: str = WAITING, selector: str = "") -> list[Value]:
    async def main() -> list[Value]:
        reader = Reader(pods, scraper)  # type: ignore[arg-type]
        try:
            return list(await reader.values("models", name, metric, selector=selector))
        finally:
            await reader.close()

    return asyncio.run(main())


def test_every_live_engine_that_answers_has_a_value() -> None:
    pods = Pods(pod("a"), pod("b"), pod("dying", metadata={"deletionTimestamp": "now"}))
    found = values(pods, Scraper(a={WAITING: 1.0}, dying={WAITING: 99.0}))
    assert found == [Value(pod="a", number=1.0, at=AT)]


def test_a_pod_that_lacks_the_metric_is_missing_and_not_zero() -> None:
    scraper = Scraper(a={WAITING: 0.0}, b={RUNNING: 1.0})
    assert [value.pod for value in values(Pods(pod("a"), pod("b")), scraper)] == ["a"]


def test_the_callers_selector_is_narrowed_to_engines() -> None:
    pods = Pods()
    assert values(pods, Scraper(), selector="app.kubernetes.io/instance=chat,tier notin (x)") == []
    assert values(pods, Scraper()) == []
    assert pods.asked == [
        ("Pod", "models", f"app.kubernetes.io/instance=chat,tier notin (x),{ENGINES}"),
        ("Pod", "models", ENGINES),
    ]


def test_a_named_pod_is_answered_alone() -> None:
    pods, scraper = Pods(pod("a"), pod("b")), Scraper(a={WAITING: 1.0}, b={WAITING: 2.0})
    assert [value.number for value in values(pods, scraper, "b")] == [2.0]


@pytest.mark.parametrize(("name", "why"), [("b", "no ready engine"), ("a", "doesn't answer")])
def test_a_named_pod_without_a_value_is_not_found(name: str, why: str) -> None:
    with pytest.raises(NotFound, match=why):
        values(Pods(pod("a")), Scraper(), name)


def test_a_selector_that_the_api_server_refuses_is_the_callers_mistake() -> None:
    with pytest.raises(BadRequest, match=r"labelSelector 'a in'.*unable to parse"):
        values(Pods(failure=Rejected("unable to parse", status=400)), Scraper(), selector="a in")


@pytest.mark.parametrize(
    "failure", [Rejected("forbidden", status=403), Unavailable("away"), ApiError("odd", status=404)]
)
def test_pods_that_cannot_be_listed_are_nobodys_zero(failure: ApiError) -> None:
    with pytest.raises(NotAvailable, match="models"):
        values(Pods(failure=failure), Scraper())


def test_concurrent_requests_share_a_list() -> None:
    pods, scraper = Pods(pod("a")), Scraper(a={WAITING: 1.0, RUNNING: 2.0})

    async def main() -> None:
        reader = Reader(pods, scraper)  # type: ignore[arg-type]
        metrics = [WAITING, RUNNING] * 10
        found = await asyncio.gather(*(reader.values("models", "*", metric, selector="") for metric in metrics))
        assert [value.number for row in found for value in row] == [1.0, 2.0] * 10
        await reader.close()

    asyncio.run(main())
    assert len(pods.asked) == 1
