"""The autoscaler: up quickly, down slowly, on what users feel where the user asks for it.

A HorizontalPodAutoscaler of ours, or a ScaledObject from which KEDA makes one. Utilisation is the engine container's
own, so that a sidecar without requests, injected or not, never breaks scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pagedserve_operator.desired.facts import Facts
from pagedserve_operator.desired.head import head
from pagedserve_operator.desired.monitoring import INSTANCE_LABEL
from pagedserve_operator.engine_metrics import ENGINE_METRICS, Targets
from pagedserve_operator.errors import SpecError
from pagedserve_operator.fields import quantity
from pagedserve_operator.kinds import KEDA_AUTOSCALER, KINDS
from pagedserve_operator.names import ENGINE_CONTAINER
from pagedserve_operator.spec import Autoscaling, InferenceService, Json

UTILIZATION: Final = {"cpu": 70, "memory": 80}
"""Percent of the request, by default."""
POLLING_SECONDS: Final = 15
"""Between two questions of KEDA's, as an autoscaler of Kubernetes asks."""
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


def horizontal_pod_autoscaler(service: InferenceService, facts: Facts) -> Json | None:
    """The autoscaler of the Deployment, where autoscaling is on and KEDA isn't asked for."""
    autoscaling = service.spec.autoscaling
    if autoscaling is None or autoscaling.backend != "HPA":
        return None
    return {
        **head(service, "HorizontalPodAutoscaler"),
        "spec": {
            "scaleTargetRef": _scaled(service),
            "minReplicas": autoscaling.min_replicas,
            "maxReplicas": autoscaling.max_replicas,
            "metrics": [_metric(name, target) for name, target in _targets(autoscaling, facts.targets)],
            "behavior": _behavior(autoscaling.behavior or {}),
        },
    }


def scaled_object(service: InferenceService, facts: Facts) -> Json | None:
    """What KEDA makes an autoscaler from, where that is asked for and can be: see needs_prometheus()."""
    autoscaling = service.spec.autoscaling
    if autoscaling is None or autoscaling.backend != "KEDA":
        return None
    targets = list(_targets(autoscaling, facts.targets))
    if needs_prometheus(autoscaling) and not facts.prometheus_url:
        return None
    return {
        **head(service, KEDA_AUTOSCALER),
        "spec": {
            "scaleTargetRef": _scaled(service),
            "pollingInterval": POLLING_SECONDS,
            "minReplicaCount": autoscaling.min_replicas,
            "maxReplicaCount": autoscaling.max_replicas,
            "advanced": {
                # What runs stays when the ScaledObject goes.
                "restoreToOriginalReplicaCount": False,
                "horizontalPodAutoscalerConfig": {"behavior": _behavior(autoscaling.behavior or {})},
            },
            "triggers": [_trigger(service, name, target, url=facts.prometheus_url) for name, target in targets],
        },
    }


def _scaled(service: InferenceService) -> Json:
    """What either autoscaler scales."""
    return {"apiVersion": KINDS["Deployment"].api_version, "kind": "Deployment", "name": service.key.name}


def needs_prometheus(autoscaling: Autoscaling) -> bool:
    """Whether KEDA has to ask Prometheus: cpu and memory it asks elsewhere."""
    return any(row.get("name") in ENGINE_METRICS for row in autoscaling.metrics)


def _targets(autoscaling: Autoscaling, usual: Targets) -> Iterator[tuple[str, int | str]]:
    """Each metric's name and target: percent for UTILIZATION, a quantity for each engine for ENGINE_METRICS."""
    for index, row in enumerate(autoscaling.metrics or tuple({"name": name} for name in UTILIZATION)):
        name = str(row.get("name"))
        if name in UTILIZATION:
            yield name, row.get("averageUtilization", UTILIZATION[name])
        elif name in ENGINE_METRICS:
            yield name, str(row.get("averageValue", usual.of(name)))
        else:
            known = ", ".join([*UTILIZATION, *ENGINE_METRICS])
            field = f"spec.autoscaling.metrics[{index}].name"
            raise SpecError(field, f"{name!r} is no metric: write one of {known}")


def _metric(name: str, aim: int | str) -> Json:
    if name in UTILIZATION:
        target: Json = {"type": "Utilization", "averageUtilization": aim}
        source = {"name": name, "container": ENGINE_CONTAINER, "target": target}
        return {"type": "ContainerResource", "containerResource": source}
    target = {"type": "AverageValue", "averageValue": aim}
    return {"type": "Pods", "pods": {"metric": {"name": ENGINE_METRICS[name]}, "target": target}}


def _trigger(service: InferenceService, name: str, aim: int | str, *, url: str) -> Json:
    if name in UTILIZATION:
        metadata = {"value": str(aim), "containerName": ENGINE_CONTAINER}
        return {"type": name, "metricType": "Utilization", "metadata": metadata}
    key = service.key
    # The sum over all engines, which KEDA's autoscaler divides by the target for each; one that is scraped by two
    # monitors, or kept by two Prometheus, counts once.
    series = f'{ENGINE_METRICS[name]}{{namespace="{key.namespace}",{INSTANCE_LABEL}="{key.name}"}}'
    query = f"sum(max by (pod) ({series}))"
    threshold = f"{quantity(aim).normalize():f}"
    # No answer is no zero: a Prometheus that has lost the engines would have them scaled down.
    metadata = {"serverAddress": url, "query": query, "threshold": threshold, "ignoreNullValues": "false"}
    return {"type": "prometheus", "name": name, "metricType": "AverageValue", "metadata": metadata}


def _behavior(given: dict[str, Any]) -> Json:
    return {way: {**usual, **(given.get(way) or {})} for way, usual in BEHAVIOR.items()}
