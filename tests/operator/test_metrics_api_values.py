from __future__ import annotations

from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from pagedserve_operator.fields import quantity
from pagedserve_operator.metrics_api.documents import quantity_of
from pagedserve_operator.metrics_api.values import Reading, read_numbers

NAMES = ("pagedserve_requests_waiting", "pagedserve_queue_wait_seconds")


def exposition(**values: float) -> str:
    """What an engine shows: gauges among others, with their comments."""
    registry = CollectorRegistry()
    Histogram("pagedserve_request_queue_wait_seconds", "A histogram", registry=registry).observe(1)
    for name, value in values.items():
        Gauge(f"pagedserve_{name}", "A gauge", registry=registry).set(value)
    return generate_latest(registry).decode()


def test_the_gauges_that_are_asked_for_are_read() -> None:
    text = exposition(requests_waiting=3, queue_wait_seconds=0.25, requests_running=7)
    assert read_numbers(text, NAMES) == {"pagedserve_requests_waiting": 3, "pagedserve_queue_wait_seconds": 0.25}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e25, -1e15])
def test_what_can_be_no_quantity_is_missing(number: float) -> None:
    assert read_numbers(exposition(requests_waiting=number), NAMES) == {}


@pytest.mark.parametrize("number", [999e12, -999e12])
def test_the_largest_numbers_are_quantities(number: float) -> None:
    (read,) = read_numbers(exposition(requests_waiting=number), NAMES).values()
    assert quantity(quantity_of(read)) == int(number)


def test_a_metric_that_is_not_there_is_missing_and_not_zero() -> None:
    assert read_numbers(exposition(requests_waiting=0), NAMES) == {"pagedserve_requests_waiting": 0}


def test_longer_names_and_labelled_series_are_others() -> None:
    text = 'pagedserve_requests_waiting_total 9\npagedserve_requests_waiting{kind="a"} 8\n'
    assert read_numbers(text, NAMES) == {}


def test_a_text_without_an_end_of_line_is_read_to_its_end() -> None:
    assert read_numbers("pagedserve_requests_waiting 5", NAMES) == {"pagedserve_requests_waiting": 5}


@pytest.mark.parametrize("text", ["pagedserve_requests_waiting many\n", "pagedserve_requests_waiting\n"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the parser's own
        read_numbers(text, NAMES)


def test_a_reading_without_numbers_is_missing() -> None:
    now = datetime.now(UTC)
    assert Reading({}, now).missing
    assert not Reading({"pagedserve_requests_waiting": 0.0}, now).missing
