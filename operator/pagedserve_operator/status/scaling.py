"""Whether autoscaling works, read from the HorizontalPodAutoscaler's own conditions.

``ScalingActive`` exists only where the resource asks for autoscaling, or where an autoscaler of somebody else fights
with ``spec.replicas``. Somebody else's autoscaler alone, on a resource that leaves its replicas open, is a way to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from pagedserve_operator.desired.autoscaler import needs_prometheus
from pagedserve_operator.spec import Autoscaling, Json, Spec
from pagedserve_operator.status.conditions import Condition, ConditionStatus
from pagedserve_operator.status.observed import condition, number, table, text

MEASURED: Final = timedelta(seconds=45)
"""At most so long after a pod is ready it is measured: twice by metrics-server, then by the autoscaler, 15 s each."""
_NAMED: Final = 3
_OF_ENGINES: Final = "FailedGetPodsMetric"
_OF_PROMETHEUS: Final = "FailedGetExternalMetric"


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What autoscaling can rely on here."""

    keda: bool = False
    """Whether the cluster knows KEDA's ScaledObjects."""
    prometheus: bool = False
    """Whether the operator knows where KEDA finds Prometheus."""
    metrics_trouble: str = ""
    """Why the engines' metrics don't reach autoscalers through the operator; empty: nothing is known against it."""


_NO_MEANS: Final = Means()


def scaling_active(
    spec: Spec,
    *,
    hpa: Json | None,
    foreign: Sequence[str],
    measurable: bool,
    scaled_object: Json | None = None,
    means: Means = _NO_MEANS,
) -> Condition | None:
    """The condition; None where there is nothing to say. ``foreign``: other autoscalers of our Deployment.

    ``measurable``: whether a pod has been ready for MEASURED.
    """
    if foreign and (spec.autoscaling is not None or spec.replicas is not None):
        return _condition("False", "AutoscalerConflict", _conflict(spec, foreign))
    if spec.autoscaling is None:
        return None
    return _kedas_obstacle(spec.autoscaling, scaled_object, means) or _verdict(hpa, means, measurable=measurable)


def _kedas_obstacle(autoscaling: Autoscaling, scaled_object: Json | None, means: Means) -> Condition | None:
    """What keeps KEDA from scaling, or from leaving it to us."""
    if autoscaling.backend == "HPA":
        if scaled_object is None:
            return None
        told = "KEDA's ScaledObject is on its way out: see that KEDA runs, which has to let it go"
        return _condition("Unknown", "WaitingForKEDA", told)
    if not means.keda:
        cure = "install KEDA, or remove spec.autoscaling.backend"
        return _condition("False", "KEDAMissing", f"spec.autoscaling.backend is KEDA, which isn't installed: {cure}")
    if needs_prometheus(autoscaling) and not means.prometheus:
        cure = "set PROMETHEUS_URL of the operator, or scale by cpu and memory"
        return _condition("False", "PrometheusUnknown", f"KEDA reads engine metrics from Prometheus: {cure}")
    able = condition(scaled_object, "Ready")
    return _condition("False", "ScalingFailed", f"KEDA: {_told(able)}") if able.get("status") == "False" else None


def _verdict(hpa: Json | None, means: Means, *, measurable: bool) -> Condition:
    able, active = condition(hpa, "AbleToScale"), condition(hpa, "ScalingActive")
    if "AmbiguousSelector" in (able.get("reason"), active.get("reason")):
        cure = "another autoscaler's target selects the same pods: delete it, or remove spec.autoscaling"
        return _condition("False", "AutoscalerConflict", cure)
    if able.get("status") == "False":
        return _condition("False", "ScalingFailed", _told(able))
    if active.get("status") == "True":
        low, high = number(hpa, "spec", "minReplicas", default=1), number(hpa, "spec", "maxReplicas")
        return _condition("True", "Active", f"between {low} and {high} replicas, as the metrics ask for")
    if active.get("reason") == "ScalingDisabled":
        return _condition("False", "ScalingDisabled", "the Deployment is scaled to 0: scale it to 1 to go on")
    if not measurable or active.get("status") != "False":
        # What the autoscaler says stands until it looks again: of pods that weren't ready then it found no metrics.
        return _condition("Unknown", "WaitingForMetrics", "the autoscaler has no metrics of ready pods yet")
    return _condition("False", "MetricsUnavailable", f"{_missing(text(active, 'reason'), means)} ({_told(active)})")


def _missing(reason: str, means: Means) -> str:
    """Which part between engines and autoscaler is missing, and what to do."""
    if reason == _OF_ENGINES:
        usual = "see that the operator may reach port 8080 of the engines' pods (network policies)"
        return f"the engines' metrics don't reach the autoscaler: {means.metrics_trouble or usual}"
    if reason == _OF_PROMETHEUS:
        return "Prometheus doesn't give KEDA the engines' metrics: see that it scrapes them and PROMETHEUS_URL is right"
    return "cpu and memory don't reach the autoscaler: see that metrics-server runs, or scale by engine metrics"


def _conflict(spec: Spec, foreign: Sequence[str]) -> str:
    names = sorted(foreign)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    field = "spec.autoscaling" if spec.autoscaling is not None else "spec.replicas"
    return (
        f"HorizontalPodAutoscaler {', '.join(names[:_NAMED])}{more} scales the same Deployment: delete it, or remove "
        f"{field}"
    )


def _told(row: Json) -> str:
    return text(row, "message") or text(table(row), "reason") or "the autoscaler doesn't say why"


def _condition(status: ConditionStatus, reason: str, message: str) -> Condition:
    return Condition(type="ScalingActive", status=status, reason=reason, message=message)
