from __future__ import annotations

from typing import Any, get_args

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pagedserve_operator.metrics import METRICS_API_STATES, Metrics, Resources
from pagedserve_operator.metrics_api.api import State
from pagedserve_operator.names import Key

CHAT, CODE = Key("models", "chat"), Key("models", "code")


class Queue:
    """A work queue as metrics see it."""

    def __init__(self, depth: int = 0, oldest_seconds: float = 0.0) -> None:
        self._depth = depth
        self.oldest_seconds = oldest_seconds

    def __len__(self) -> int:
        return self._depth


def conditions(**statuses: str) -> list[dict[str, str]]:
    return [{"type": kind, "status": status, "reason": "R", "message": "m"} for kind, status in statuses.items()]


def shown(metrics: Metrics) -> dict[tuple[Any, ...], float]:
    """Values by name and values of labels."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def showing(**live: Any) -> tuple[Metrics, Resources]:
    metrics = Metrics()
    given = {"queue": Queue(), "ages": dict, "leading": lambda: True, **live}
    return metrics, metrics.show(**given)


def test_looks_are_counted_by_result_and_timed() -> None:
    metrics, _ = showing()
    metrics.reconciles.labels("changed").inc()
    metrics.reconcile_seconds.observe(0.02)
    values = shown(metrics)
    assert values["pagedserve_operator_reconciles_total", "changed"] == 1
    assert values["pagedserve_operator_reconcile_seconds_count",] == 1
    assert values["pagedserve_operator_reconcile_seconds_bucket", "0.025"] == 1


def test_calls_are_counted_by_verb_and_code() -> None:
    metrics, _ = showing()
    metrics.api_calls.labels("apply", "409").inc()
    assert shown(metrics)["pagedserve_operator_api_calls_total", "409", "apply"] == 1


def test_what_lives_elsewhere_is_read_when_asked() -> None:
    queue, ages, leading = Queue(3, 1.5), {"Pod": 2.0}, [True]
    metrics, _ = showing(queue=queue, ages=lambda: ages, leading=lambda: leading[0])
    values = shown(metrics)
    assert values["pagedserve_operator_queue_depth",] == 3
    assert values["pagedserve_operator_queue_oldest_seconds",] == 1.5
    assert values["pagedserve_operator_watch_event_age_seconds", "Pod"] == 2
    assert values["pagedserve_operator_leading",] == 1
    queue.oldest_seconds, ages["Service"], leading[0] = 0.0, 4.0, False
    values = shown(metrics)
    assert values["pagedserve_operator_queue_oldest_seconds",] == 0
    assert values["pagedserve_operator_watch_event_age_seconds", "Service"] == 4
    assert values["pagedserve_operator_leading",] == 0


def test_resources_are_counted_by_their_last_conditions() -> None:
    metrics, resources = showing()
    resources.report(CHAT, conditions(Ready="False", Progressing="True"))
    resources.report(CODE, conditions(Ready="True"))
    resources.report(CHAT, conditions(Ready="True", Progressing="False"))
    values = shown(metrics)
    assert len(resources) == 2
    assert values["pagedserve_operator_resources", "Ready", "True"] == 2
    assert values["pagedserve_operator_resources", "Progressing", "False"] == 1
    assert ("pagedserve_operator_resources", "Ready", "False") not in values


def test_a_resource_that_is_gone_is_counted_no_more() -> None:
    metrics, resources = showing()
    resources.report(CHAT, conditions(Ready="True"))
    resources.forget(CHAT)
    resources.forget(CODE)
    assert not len(resources)
    assert not [name for name, *_ in shown(metrics) if name == "pagedserve_operator_resources"]


def test_a_process_that_no_longer_leads_tells_nothing_of_resources() -> None:
    leading = [True]
    metrics, resources = showing(leading=lambda: leading[0])
    resources.report(CHAT, conditions(Ready="True"))
    assert ("pagedserve_operator_resources", "Ready", "True") in shown(metrics)
    leading[0] = False
    assert ("pagedserve_operator_resources", "Ready", "True") not in shown(metrics)


def test_the_metrics_api_shows_its_state_and_counts_answers_and_reads() -> None:
    state = ["starting"]
    metrics, _ = showing(metrics_api=lambda: state[0], clock_ahead=lambda: 90.0)
    metrics.metrics_api_answered(403)
    metrics.engine_read("failed")
    values = shown(metrics)
    assert values["pagedserve_operator_metrics_api_requests_total", "403"] == 1
    assert values["pagedserve_operator_engine_reads_total", "failed"] == 1
    assert values["pagedserve_operator_clock_ahead_seconds",] == 90
    for name in METRICS_API_STATES:
        state[0] = name
        values = shown(metrics)
        shown_states = {other for other in METRICS_API_STATES if values["pagedserve_operator_metrics_api", other]}
        assert shown_states == {name}


def test_the_states_are_those_of_the_metrics_api() -> None:
    assert set(METRICS_API_STATES) == set(get_args(State))


def test_two_operators_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.reconciles.labels("changed").inc()
    assert ("pagedserve_operator_reconciles_total", "changed") not in shown(other)


def test_every_instrument_is_named_with_its_prefix_and_explained() -> None:
    metrics, _ = showing()
    for family in metrics.registry.collect():
        assert family.name.startswith("pagedserve_operator_")
        assert family.documentation
