from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from pagedserve_operator.engine_metrics import ENGINE_METRICS
from pagedserve_operator.fields import quantity
from pagedserve_operator.metrics_api.documents import (
    failure,
    group,
    group_list,
    quantity_of,
    resource_list,
    value_list,
)
from pagedserve_operator.metrics_api.values import Value

AT = datetime(2026, 6, 1, 14, 0, 7, 900_000, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (4.0, "4"),
        (0.5, "500m"),
        (1.5, "1500m"),
        (0.1, "100m"),
        (0.0001, "1m"),
        (0.8500001, "851m"),
        (0.85, "850m"),
        (1e6, "1000000"),
        (123456789.25, "123456789250m"),
        (-0.5, "-500m"),
    ],
)
def test_a_number_is_a_quantity_rounded_up_to_thousandths(number: float, text: str) -> None:
    assert quantity_of(number) == text
    assert float(quantity(text)) == pytest.approx(number, abs=0.001)


def test_discovery_names_a_subresource_of_pods_for_each_metric() -> None:
    names = {row["name"] for row in resource_list()["resources"]}
    assert names == {f"pods/{series}" for series in ENGINE_METRICS.values()}
    assert all(row["namespaced"] and row["verbs"] == ["get"] for row in resource_list()["resources"])
    assert resource_list()["groupVersion"] == "custom.metrics.k8s.io/v1beta2"


def test_the_group_prefers_its_one_version() -> None:
    assert group()["preferredVersion"] in group()["versions"]
    (listed,) = group_list()["groups"]
    assert listed["name"] == group()["name"] == "custom.metrics.k8s.io"


def test_a_value_names_its_pod_and_the_time_of_its_reading() -> None:
    found = value_list("models", "pagedserve_requests_waiting", [Value(pod="chat-1", number=2.5, at=AT)])
    assert (found["kind"], found["apiVersion"]) == ("MetricValueList", "custom.metrics.k8s.io/v1beta2")
    assert found["items"] == [
        {
            "describedObject": {"kind": "Pod", "namespace": "models", "name": "chat-1", "apiVersion": "v1"},
            "metric": {"name": "pagedserve_requests_waiting", "selector": None},
            "timestamp": "2026-06-01T12:00:07Z",
            "value": "2500m",
        }
    ]


def test_no_values_are_an_empty_list() -> None:
    assert value_list("models", "pagedserve_requests_waiting", [])["items"] == []


def test_a_failure_says_when_to_try_again_where_that_is_known() -> None:
    told = failure(429, "TooManyRequests", "slower", retry_after=3)
    assert (told["code"], told["reason"], told["message"]) == (429, "TooManyRequests", "slower")
    assert told["details"] == {"retryAfterSeconds": 3}
    assert "details" not in failure(404, "NotFound", "none")
