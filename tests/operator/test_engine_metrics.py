from __future__ import annotations

from crd import schema
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.engine_metrics import ENGINE_METRICS, Targets
from pagedserve_operator.fields import quantity


def test_the_resource_takes_each_of_them_and_cpu_and_memory() -> None:
    autoscaling = schema()["properties"]["spec"]["properties"]["autoscaling"]["properties"]
    names = autoscaling["metrics"]["items"]["properties"]["name"]["enum"]
    assert set(names) == {*ENGINE_METRICS, "cpu", "memory"}
    assert autoscaling["metrics"]["maxItems"] == len(names)


def test_each_has_a_target_that_the_operators_settings_give() -> None:
    config = OperatorConfig(
        target_waiting_requests="1", target_running_requests="2", target_queue_wait_seconds="3", target_cache_use="4m"
    )
    aims = {name: config.targets.of(name) for name in ENGINE_METRICS}
    assert aims == {"waitingRequests": "1", "runningRequests": "2", "queueWaitSeconds": "3", "cacheUse": "4m"}


def test_the_usual_targets_are_the_documented_ones() -> None:
    usual = {name: quantity(Targets().of(name)) for name in ENGINE_METRICS}
    assert usual == {
        "waitingRequests": 4,
        "runningRequests": 16,
        "queueWaitSeconds": quantity("0.5"),
        "cacheUse": quantity("0.85"),
    }
