"""The HorizontalPodAutoscaler: up quickly, down slowly, on what users feel where the user asks for it.

Utilisation is the engine container's own, so that a sidecar without requests, injected or not, never breaks scaling.
"""

from __future__ import annotations

from typing import Any, Final

from pagedserve_operator.desired.head import head
from pagedserve_operator.errors import SpecError
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.names import ENGINE_CONTAINER
from pagedserve_operator.spec import InferenceService, Json

UTILIZATION: Final = {"cpu": 70, "memory": 80}
"""Percent of the request, by default."""
ENGINE_METRICS: Final = {
    "waitingRequests": ("pagedserve_requests_waiting", "4"),
    "queueWaitSeconds": ("pagedserve_queue_wait_seconds", "1"),
    "cacheUse": ("pagedserve_cache_usage_ratio", "800m"),
}
"""The engine's name for each, and the average of the pods that is aimed at by default."""
BEHAVIOR: Final[dict[str, Json]] = {
    "scaleUp": {
        "stabilizationWindowSeconds": 60,
        "selectPolicy": "Max",
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}],
    },
    "scaleDown": {
        "stabilizationWindowSeconds": 300,
        "selectPolicy": "Max",
        "policies": [{"type": "Percent", "value": 50, "periodSeconds": 60}],
    },
}


def horizontal_pod_autoscaler(service: InferenceService) -> Json | None:
    """The autoscaler of the Deployment, where autoscaling is on."""
    autoscaling = service.spec.autoscaling
    if autoscaling is None:
        return None
    metrics = autoscaling.metrics or tuple({"name": name} for name in UTILIZATION)
    return {
        **head(service, "HorizontalPodAutoscaler"),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": KINDS["Deployment"].api_version,
                "kind": "Deployment",
                "name": service.key.name,
            },
            "minReplicas": autoscaling.min_replicas,
            "maxReplicas": autoscaling.max_replicas,
            "metrics": [_metric(row, f"spec.autoscaling.metrics[{index}]") for index, row in enumerate(metrics)],
            "behavior": _behavior(autoscaling.behavior or {}),
        },
    }


def _metric(row: Json, field: str) -> Json:
    name = row.get("name")
    if name in UTILIZATION:
        aim = row.get("averageUtilization", UTILIZATION[name])
        target: Json = {"type": "Utilization", "averageUtilization": aim}
        source = {"name": name, "container": ENGINE_CONTAINER, "target": target}
        return {"type": "ContainerResource", "containerResource": source}
    if name in ENGINE_METRICS:
        metric, usual = ENGINE_METRICS[name]
        target = {"type": "AverageValue", "averageValue": str(row.get("averageValue", usual))}
        return {"type": "Pods", "pods": {"metric": {"name": metric}, "target": target}}
    known = ", ".join([*UTILIZATION, *ENGINE_METRICS])
    raise SpecError(f"{field}.name", f"{name!r} is no metric: write one of {known}")


def _behavior(given: dict[str, Any]) -> Json:
    return {way: {**usual, **(given.get(way) or {})} for way, usual in BEHAVIOR.items()}
