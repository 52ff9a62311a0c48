"""Whether autoscaling works, read from the HorizontalPodAutoscaler's own conditions.

``ScalingActive`` exists only where the resource asks for autoscaling, or where an autoscaler of somebody else fights
with ``spec.replicas``. Somebody else's autoscaler alone, on a resource that leaves its replicas open, is a way to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pagedserve_operator.spec import Json, Spec
from pagedserve_operator.status.conditions import Condition, ConditionStatus
from pagedserve_operator.status.observed import condition, number, table, text

_NAMED: Final = 3


def scaling_active(spec: Spec, *, hpa: Json | None, foreign: Sequence[str], ready: int) -> Condition | None:
    """The condition; None where there is nothing to say. ``foreign``: other autoscalers of our Deployment."""
    if foreign and (spec.autoscaling is not None or spec.replicas is not None):
        return _condition("False", "AutoscalerConflict", _conflict(spec, foreign))
    if spec.autoscaling is None:
        return None
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
    if ready == 0 or active.get("status") != "False":
        # Without a ready pod the autoscaler finds no metrics: that is no trouble of its own.
        return _condition("Unknown", "WaitingForMetrics", "the autoscaler has no metrics of ready pods yet")
    cure = "see that metrics-server, or the adapter of spec.autoscaling.metrics, runs"
    return _condition("False", "MetricsUnavailable", f"{_told(active)}; {cure}")


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
