"""HTTP responses counted by route and class of status: two labels of few values."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class HttpMetrics:
    """The server's own instrument; what happens to admitted requests is the engine's to count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._responses = Counter(
            "pagedserve_http_responses",
            "HTTP responses by route and class of status (4xx includes clients that went away)",
            ["route", "status"],
            registry=registry,
        )

    def count(self, route: str, status: int) -> None:
        """Note a response; ``route`` is a pattern of the route table, never a path that a client made up."""
        self._responses.labels(route, f"{status // 100}xx").inc()
