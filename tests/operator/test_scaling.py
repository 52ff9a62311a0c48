from typing import Any

import pytest

from engine_world import autoscaler, condition, resource
from pagedserve_operator.parsing import parse
from pagedserve_operator.status.conditions import Condition
from pagedserve_operator.status.scaling import scaling_active

ABLE = condition("AbleToScale", "True", reason="SucceededGetScale")


def judge(hpa: dict[str, Any] | None = None, *, foreign: tuple[str, ...] = (), ready: int = 1, **spec: Any) -> Any:
    return scaling_active(parse(resource(**spec)).spec, hpa=hpa, foreign=foreign, ready=ready)


def active(status: str, reason: str, message: str = "") -> dict[str, Any]:
    return autoscaler(ABLE, condition("ScalingActive", status, reason=reason, message=message))


TABLE = {
    "metrics are found": (active("True", "ValidMetricFound", "successfully calculated"), ("True", "Active")),
    "nothing is known yet": (autoscaler(), ("Unknown", "WaitingForMetrics")),
    "the autoscaler is being made": (None, ("Unknown", "WaitingForMetrics")),
    "there is no metrics server": (
        active("False", "FailedGetResourceMetric", "unable to get metrics for resource cpu"),
        ("False", "MetricsUnavailable"),
    ),
    "there is no adapter": (
        active("False", "FailedGetPodsMetric", "unable to get metric"),
        ("False", "MetricsUnavailable"),
    ),
    "it was scaled to zero": (active("False", "ScalingDisabled"), ("False", "ScalingDisabled")),
    "two autoscalers select the same pods": (
        autoscaler(condition("AbleToScale", "True"), condition("ScalingActive", "False", reason="AmbiguousSelector")),
        ("False", "AutoscalerConflict"),
    ),
    "the scale can't be read": (
        autoscaler(condition("AbleToScale", "False", reason="FailedGetScale", message="forbidden")),
        ("False", "ScalingFailed"),
    ),
}


@pytest.mark.parametrize("world", TABLE)
def test_autoscaling_is_judged_when(world: str) -> None:
    hpa, expected = TABLE[world]
    found: Condition = judge(hpa, autoscaling={})
    assert (found.status, found.reason) == expected
    assert found.message


def test_missing_metrics_are_no_trouble_before_a_pod_is_ready() -> None:
    found = judge(active("False", "FailedGetResourceMetric", "no metrics"), autoscaling={}, ready=0)
    assert (found.status, found.reason) == ("Unknown", "WaitingForMetrics")


def test_the_metric_that_decides_does_not_change_the_message() -> None:
    one, other = (
        judge(active("True", "ValidMetricFound", f"calculated from {metric}"), autoscaling={}) for metric in ("a", "b")
    )
    assert one == other
    assert "between 2 and 10 replicas" in one.message


@pytest.mark.parametrize(("field", "value"), [("autoscaling", {}), ("replicas", 2)])
def test_somebody_elses_autoscaler_is_a_conflict_that_names_both_sides(field: str, value: Any) -> None:
    found = judge(active("True", "ValidMetricFound"), foreign=("zeta", "keda"), **{field: value})
    assert (found.status, found.reason) == ("False", "AutoscalerConflict")
    assert "keda, zeta" in found.message
    assert f"spec.{field}" in found.message


def test_somebody_elses_autoscaler_alone_is_a_way_to_run() -> None:
    assert judge(foreign=("keda",)) is None


def test_without_autoscaling_there_is_nothing_to_say() -> None:
    assert judge(active("False", "FailedGetResourceMetric"), replicas=2) is None
