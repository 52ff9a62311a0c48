"""What scales a resource: a HorizontalPodAutoscaler of ours, or a ScaledObject for KEDA; never both."""

from __future__ import annotations

from typing import Any

import pytest

from children import gpu_tuning, service
from pagedserve_operator.desired import Facts, desired
from pagedserve_operator.engine_metrics import ENGINE_METRICS, Targets
from pagedserve_operator.errors import SpecError
from pagedserve_operator.kinds import AUTOSCALER, KEDA_AUTOSCALER, OPTIONAL
from pagedserve_operator.spec import Json

PROMETHEUS = "http://prometheus.monitoring.svc:9090"
FACTS = Facts(served_kinds=OPTIONAL, prometheus_url=PROMETHEUS)


def scalers(autoscaling: Json, facts: Facts = FACTS) -> dict[str, Json]:
    """``spec`` of every autoscaler by kind."""
    children = desired(service({"autoscaling": autoscaling}), gpu_tuning(), facts)
    return {row["kind"]: row["spec"] for row in children if row["kind"] in (AUTOSCALER, KEDA_AUTOSCALER)}


def metrics(*names: str, **more: Any) -> Json:
    return {"metrics": [{"name": name, **more} for name in names]}


def test_the_engines_metrics_are_asked_for_by_pod_with_the_usual_targets() -> None:
    rows = scalers(metrics(*ENGINE_METRICS))[AUTOSCALER]["metrics"]
    aims = {row["pods"]["metric"]["name"]: row["pods"]["target"] for row in rows}
    assert aims == {
        "pagedserve_requests_waiting": {"type": "AverageValue", "averageValue": "4"},
        "pagedserve_requests_running": {"type": "AverageValue", "averageValue": "16"},
        "pagedserve_queue_wait_seconds": {"type": "AverageValue", "averageValue": "500m"},
        "pagedserve_cache_usage_ratio": {"type": "AverageValue", "averageValue": "850m"},
    }


def test_the_operators_targets_take_their_place_and_the_resources_win() -> None:
    facts = Facts(targets=Targets(queue_wait_seconds="2"))
    (row,) = scalers(metrics("queueWaitSeconds"), facts)[AUTOSCALER]["metrics"]
    assert row["pods"]["target"]["averageValue"] == "2"
    (row,) = scalers(metrics("queueWaitSeconds", averageValue="250m"), facts)[AUTOSCALER]["metrics"]
    assert row["pods"]["target"]["averageValue"] == "250m"


@pytest.mark.parametrize(
    ("backend", "kind"), [({}, AUTOSCALER), ({"backend": "HPA"}, AUTOSCALER), ({"backend": "KEDA"}, KEDA_AUTOSCALER)]
)
def test_one_backend_scales(backend: Json, kind: str) -> None:
    assert set(scalers(backend)) == {kind}


def test_another_backend_is_refused_by_its_field() -> None:
    with pytest.raises(SpecError, match=r"spec\.autoscaling\.backend: must be one of HPA, KEDA"):
        scalers({"backend": "VPA"})


def test_keda_is_told_the_same_in_its_words() -> None:
    behavior = {"scaleUp": {"stabilizationWindowSeconds": 0}}
    rows = [{"name": "cpu"}, {"name": "queueWaitSeconds"}, {"name": "waitingRequests", "averageValue": "10"}]
    given = {"backend": "KEDA", "minReplicas": 1, "maxReplicas": 7, "metrics": rows, "behavior": behavior}
    found = scalers(given)[KEDA_AUTOSCALER]
    assert found["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat"}
    assert (found["minReplicaCount"], found["maxReplicaCount"]) == (1, 7)
    assert found["advanced"]["restoreToOriginalReplicaCount"] is False
    ours = scalers({**given, "backend": "HPA"})[AUTOSCALER]
    assert found["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == ours["behavior"]
    cpu, wait, waiting = found["triggers"]
    assert cpu == {"type": "cpu", "metricType": "Utilization", "metadata": {"value": "70", "containerName": "engine"}}
    assert wait == {
        "type": "prometheus",
        "name": "queueWaitSeconds",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": PROMETHEUS,
            "query": "sum(max by (pod) ("
            'pagedserve_queue_wait_seconds{namespace="models",app_kubernetes_io_instance="chat"}))',
            "threshold": "0.5",
            "ignoreNullValues": "false",
        },
    }
    assert waiting["metadata"]["threshold"] == "10"


@pytest.mark.parametrize(
    "facts", [Facts(served_kinds=OPTIONAL), Facts(prometheus_url=PROMETHEUS)], ids=["no Prometheus", "no KEDA"]
)
def test_what_keda_lacks_leaves_the_resource_without_an_autoscaler(facts: Facts) -> None:
    assert scalers({"backend": "KEDA", **metrics("cacheUse")}, facts) == {}


def test_cpu_and_memory_need_no_prometheus() -> None:
    found = scalers({"backend": "KEDA"}, Facts(served_kinds=OPTIONAL))
    assert [row["type"] for row in found[KEDA_AUTOSCALER]["triggers"]] == ["cpu", "memory"]


def test_an_unknown_metric_is_refused_whoever_scales() -> None:
    for backend in ("HPA", "KEDA"):
        with pytest.raises(SpecError, match=r"spec\.autoscaling\.metrics\[0\]\.name: 'gpu' is no metric"):
            scalers({"backend": backend, **metrics("gpu")})
