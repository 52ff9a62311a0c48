from __future__ import annotations

import asyncio

import aiohttp
from prometheus_client import CollectorRegistry, Gauge

from pagedserve_operator import probes


def ask(path: str, *, unhealthy: list[str] | None = None, unready: list[str] | None = None) -> tuple[int, str, str]:
    """Status, content type and text."""

    async def talk() -> tuple[int, str, str]:
        registry = CollectorRegistry()
        Gauge("answer", "An answer", registry=registry).set(42)
        serving = probes.serving(
            registry, unhealthy=lambda: unhealthy or [], unready=lambda: unready or [], host="127.0.0.1", port=0
        )
        async with (
            serving as port,
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as answer,
        ):
            return answer.status, answer.content_type, await answer.text()

    return asyncio.run(talk())


def test_metrics_are_what_prometheus_reads() -> None:
    status, content_type, text = ask("/metrics")
    assert (status, content_type) == (200, "text/plain")
    assert "# TYPE answer gauge\nanswer 42.0\n" in text


def test_a_probe_passes_while_there_is_no_problem() -> None:
    assert ask("/healthz")[::2] == (200, "ok")
    assert ask("/readyz")[::2] == (200, "ok")


def test_a_probe_fails_with_its_problems_and_the_other_passes() -> None:
    problems = ["no sign of life from the watch of Pod", "no sign of life from the watch of Service"]
    assert ask("/healthz", unhealthy=problems)[::2] == (503, "\n".join(problems))
    assert ask("/readyz", unhealthy=problems)[::2] == (200, "ok")
    assert ask("/readyz", unready=["not watching yet"])[::2] == (503, "not watching yet")
    assert ask("/healthz", unready=["not watching yet"])[::2] == (200, "ok")


def test_nothing_else_is_served() -> None:
    assert ask("/")[0] == 404
