from datetime import timedelta
from typing import Any

import pytest

from engine_world import NOW, autoscaler, condition, deployment, look, ready_pod, resource, verdict
from pagedserve_operator.parsing import parse
from pagedserve_operator.status.conditions import Condition
from pagedserve_operator.status.scaling import Means, scaling_active

ABLE = condition("AbleToScale", "True", reason="SucceededGetScale")


KEDA = {"backend": "KEDA"}
ON_QUEUE = {"metrics": [{"name": "queueWaitSeconds"}]}


def judge(
    hpa: dict[str, Any] | None = None,
    *,
    foreign: tuple[str, ...] = (),
    measurable: bool = True,
    scaled_object: dict[str, Any] | None = None,
    means: Means = Means(),  # noqa: B008 - frozen
    **spec: Any,
) -> Any:
    return scaling_active(
        parse(resource(**spec)).spec,
        hpa=hpa,
        foreign=foreign,
        measurable=measurable,
        scaled_object=scaled_object,
        means=means,
    )


def active(status: str, reason: str, message: str = "") -> dict[str, Any]:
    return autoscaler(ABLE, condition("ScalingActive", status, reason=reason, message=message))


EVERYTHING = Means(keda=True, prometheus=True)

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


MISSING = {
    "FailedGetContainerResourceMetric": "metrics-server",
    "FailedGetResourceMetric": "metrics-server",
    "FailedGetPodsMetric": "port 8080",
    "FailedGetExternalMetric": "PROMETHEUS_URL",
}


@pytest.mark.parametrize("reason", MISSING)
def test_the_part_that_is_missing_is_told(reason: str) -> None:
    found = judge(active("False", reason, "the HPA was unable to compute"), autoscaling={}, means=EVERYTHING)
    assert (found.status, found.reason) == ("False", "MetricsUnavailable")
    assert MISSING[reason] in found.message
    assert "the HPA was unable to compute" in found.message


def test_what_is_known_against_the_metrics_api_is_told_where_it_matters() -> None:
    means = Means(metrics_trouble="it is served by Service monitoring/prometheus-adapter: give it the rules")
    assert means.metrics_trouble in judge(active("False", "FailedGetPodsMetric"), autoscaling={}, means=means).message
    other = judge(active("False", "FailedGetResourceMetric"), autoscaling={}, means=means)
    assert means.metrics_trouble not in other.message
    assert judge(active("True", "ValidMetricFound"), autoscaling={}, means=means).reason == "Active"


NOT_READY = {"status": {"conditions": [condition("Ready", "False", reason="Failed", message="no such Deployment")]}}
READY = {"status": {"conditions": [condition("Ready", "True", reason="ScaledObjectReady")]}}
BY_KEDA = {
    "KEDA isn't installed": ({}, Means(), None, ("False", "KEDAMissing"), "install KEDA"),
    "nobody has said where Prometheus is": (
        ON_QUEUE,
        Means(keda=True),
        None,
        ("False", "PrometheusUnknown"),
        "PROMETHEUS_URL",
    ),
    "cpu and memory need no Prometheus": ({}, Means(keda=True), None, ("Unknown", "WaitingForMetrics"), ""),
    "KEDA has not looked yet": (ON_QUEUE, EVERYTHING, {}, ("Unknown", "WaitingForMetrics"), ""),
    "KEDA refuses": (ON_QUEUE, EVERYTHING, NOT_READY, ("False", "ScalingFailed"), "no such Deployment"),
}


@pytest.mark.parametrize("world", BY_KEDA)
def test_scaling_by_keda_is_judged_when(world: str) -> None:
    more, means, scaled_object, expected, told = BY_KEDA[world]
    found = judge(autoscaling={**KEDA, **more}, means=means, scaled_object=scaled_object)
    assert (found.status, found.reason) == expected
    assert told in found.message


def test_kedas_own_autoscaler_tells_whether_it_works() -> None:
    spec = {"autoscaling": {**KEDA, **ON_QUEUE}, "means": EVERYTHING, "scaled_object": READY}
    assert judge(active("True", "ValidMetricFound"), **spec).status == "True"
    broken = judge(active("False", "FailedGetExternalMetric", "no answer"), **spec)
    assert (broken.reason, "Prometheus" in broken.message) == ("MetricsUnavailable", True)


def test_what_keda_has_not_let_go_of_holds_ours_up() -> None:
    found = judge(None, autoscaling={}, scaled_object=READY, means=EVERYTHING)
    assert (found.status, found.reason) == ("Unknown", "WaitingForKEDA")


def test_missing_metrics_are_no_trouble_before_a_pod_can_have_been_measured() -> None:
    found = judge(active("False", "FailedGetResourceMetric", "no metrics"), autoscaling={}, measurable=False)
    assert (found.status, found.reason) == ("Unknown", "WaitingForMetrics")


def test_a_pod_that_has_just_become_ready_is_given_time_to_be_measured() -> None:
    blind = active("False", "FailedGetPodsMetric", "no metrics returned")
    # Ready for 100 s when it is NOW.
    early, late = (
        look(
            resource(autoscaling={}),
            deployment=deployment(),
            pods=[ready_pod()],
            hpa=blind,
            now=NOW - timedelta(seconds=100 - since),
        )
        for since in (10, 45)
    )
    assert (verdict(early, "ScalingActive"), early.look_again_seconds) == (("Unknown", "WaitingForMetrics"), 35)
    assert (verdict(late, "ScalingActive"), late.look_again_seconds) == (("False", "MetricsUnavailable"), None)


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
