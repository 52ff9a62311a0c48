"""The engine's metrics that a resource may scale on: their names on both sides, and what to aim at by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ENGINE_METRICS: Final[Mapping[str, str]] = {
    "waitingRequests": "pagedserve_requests_waiting",
    "runningRequests": "pagedserve_requests_running",
    "queueWaitSeconds": "pagedserve_queue_wait_seconds",
    "cacheUse": "pagedserve_cache_usage_ratio",
}
"""The engine's gauge for each name in ``spec.autoscaling.metrics``; none of them has labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The average of the pods that is aimed at where a resource names none: Kubernetes quantities above 0."""

    waiting_requests: str = "4"
    running_requests: str = "16"
    queue_wait_seconds: str = "500m"
    cache_use: str = "850m"

    def of(self, name: str) -> str:
        """The target of one of ENGINE_METRICS."""
        return {
            "waitingRequests": self.waiting_requests,
            "runningRequests": self.running_requests,
            "queueWaitSeconds": self.queue_wait_seconds,
            "cacheUse": self.cache_use,
        }[name]
