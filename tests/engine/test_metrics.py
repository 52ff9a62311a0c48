from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pagedserve_engine.instruments import QueueWait, WeightedHistogram
from pagedserve_engine.metrics import INTER_TOKEN_SECONDS, EngineMetrics
from pagedserve_engine.stats import Outcome, Planned, RequestStats, StepStats


class Clock:
    """Monotonic seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(registry: CollectorRegistry, clock: Clock) -> EngineMetrics:
    return EngineMetrics(registry, clock)


def step(**changes: object) -> StepStats:
    values: dict[str, object] = {
        "duration": 0.02,
        "num_tokens": 512,
        "budget": 2048,
        "num_running": 3,
        "num_waiting": 0,
        "blocks_free": 75,
        "blocks_referenced": 25,
        "blocks_cached": 5,
        "blocks_total": 100,
    }
    return StepStats(**{**values, **changes})  # type: ignore[arg-type]


def test_a_step_sets_the_gauges_to_the_state_that_it_left(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.observe_step(step(num_waiting=7))
    values = {
        "pagedserve_requests_running": 3,
        "pagedserve_requests_waiting": 7,
        "pagedserve_blocks": 100,
        "pagedserve_blocks_free": 75,
        "pagedserve_blocks_referenced": 25,
        "pagedserve_blocks_cached": 5,
        "pagedserve_cache_usage_ratio": 0.25,
        "pagedserve_batch_fill_ratio_sum": 0.25,
        "pagedserve_step_duration_seconds_count": 1,
    }
    assert {name: registry.get_sample_value(name) for name in values} == values


def test_counters_add_up_over_steps(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    for _ in range(3):
        metrics.observe_step(
            step(
                prompt_tokens=30, cached_tokens=10, generated_tokens=2, preemptions=1, graph_replays=4, graph_captures=5
            )
        )
    values = {
        "pagedserve_prompt_tokens_total": 90,
        "pagedserve_cached_tokens_total": 30,
        "pagedserve_generated_tokens_total": 6,
        "pagedserve_preemptions_total": 3,
        "pagedserve_graph_replays_total": 12,
        "pagedserve_graph_captures_total": 15,
        "pagedserve_prefix_hit_ratio": 0.25,
    }
    assert {name: registry.get_sample_value(name) for name in values} == values


def test_a_step_that_ran_nothing_is_news_of_the_state_only(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.observe_step(step())
    metrics.observe_step(step(num_tokens=0, num_running=0, blocks_free=100, blocks_referenced=0))
    assert registry.get_sample_value("pagedserve_requests_running") == 0
    assert registry.get_sample_value("pagedserve_cache_usage_ratio") == 0
    assert registry.get_sample_value("pagedserve_step_duration_seconds_count") == 1
    assert registry.get_sample_value("pagedserve_batch_fill_ratio_count") == 1


def test_before_the_first_step_every_block_is_free(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    planned = Planned(requested=None, actual=2048)
    metrics.report_settings(
        num_blocks=Planned(1024, 513), max_batch_tokens=planned, max_model_len=Planned(8192, 8192), block_size=32
    )
    assert registry.get_sample_value("pagedserve_blocks") == 512
    assert registry.get_sample_value("pagedserve_blocks_free") == 512
    assert registry.get_sample_value("pagedserve_cache_usage_ratio") == 0


def test_settings_are_shown_as_requested_and_as_they_are(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.report_settings(
        num_blocks=Planned(1024, 513),
        max_batch_tokens=Planned(None, 2048),
        max_model_len=Planned(8192, 4096),
        block_size=32,
    )

    def value(name: str, kind: str) -> float | None:
        return registry.get_sample_value(f"pagedserve_{name}", {"kind": kind})

    assert (value("num_blocks", "requested"), value("num_blocks", "actual")) == (1024, 513)
    assert (value("max_batch_tokens", "requested"), value("max_batch_tokens", "actual")) == (None, 2048)
    assert (value("max_model_len", "requested"), value("max_model_len", "actual")) == (8192, 4096)
    assert registry.get_sample_value("pagedserve_cache_info", {"block_size": "32", "num_blocks": "513"}) == 1


def test_a_budget_that_memory_lowered_shows_in_the_gauge(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.observe_step(step(num_tokens=4, budget=4))
    assert registry.get_sample_value("pagedserve_max_batch_tokens", {"kind": "actual"}) == 4


def test_requests_count_by_outcome_and_rejected_ones_leave_no_latency(
    metrics: EngineMetrics, registry: CollectorRegistry
) -> None:
    for outcome in Outcome:
        metrics.observe_request(RequestStats(outcome=outcome, duration=1.0, prompt_tokens=5, generated_tokens=7))
    for outcome in Outcome:
        assert registry.get_sample_value("pagedserve_requests_total", {"outcome": outcome.value}) == 1
    assert registry.get_sample_value("pagedserve_request_duration_seconds_count") == len(Outcome) - 1
    assert registry.get_sample_value("pagedserve_request_generated_tokens_sum") == 7 * (len(Outcome) - 1)


def test_every_outcome_is_a_series_from_the_start(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    for outcome in Outcome:
        assert registry.get_sample_value("pagedserve_requests_total", {"outcome": outcome.value}) == 0


def test_latencies_land_in_their_histograms(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.observe_first_token(0.12)
    metrics.observe_inter_token(0.03, 8)
    assert registry.get_sample_value("pagedserve_time_to_first_token_seconds_bucket", {"le": "0.1"}) == 0
    assert registry.get_sample_value("pagedserve_time_to_first_token_seconds_bucket", {"le": "0.15"}) == 1
    assert registry.get_sample_value("pagedserve_inter_token_latency_seconds_count") == 8


def test_the_engine_names_what_it_runs(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    labels = {"model": "m", "dtype": "float32", "attention": "reference", "version": "1"}
    metrics.report_engine(**labels)
    metrics.report_device_memory(used=5, total=9)
    assert registry.get_sample_value("pagedserve_engine_info", labels) == 1
    assert registry.get_sample_value("pagedserve_device_memory_used_bytes") == 5
    assert registry.get_sample_value("pagedserve_device_memory_limit_bytes") == 9


def test_queue_wait_is_the_mean_of_what_left_the_queue_lately(clock: Clock) -> None:
    wait = QueueWait(clock, window=30)
    wait.observe(2.0)
    clock.now += 10
    wait.observe(4.0)
    assert wait.value(0.0) == 3.0
    clock.now += 21
    assert wait.value(0.0) == 4.0
    clock.now += 10
    assert wait.value(0.0) == 0.0


def test_queue_wait_is_the_age_of_the_oldest_where_that_is_more(clock: Clock) -> None:
    wait = QueueWait(clock)
    wait.observe(2.0)
    assert wait.value(1.0) == 2.0
    assert wait.value(5.0) == 5.0


def test_a_queue_that_nobody_serves_grows_older_between_scrapes(
    metrics: EngineMetrics, registry: CollectorRegistry, clock: Clock
) -> None:
    metrics.observe_step(step(num_waiting=1, oldest_waiting_age=4.0, queue_waits=(1.0,)))
    assert registry.get_sample_value("pagedserve_queue_wait_seconds") == 4.0
    clock.now += 8
    assert registry.get_sample_value("pagedserve_queue_wait_seconds") == 12.0
    metrics.observe_step(step(num_waiting=0, queue_waits=(12.0,)))
    assert registry.get_sample_value("pagedserve_queue_wait_seconds") == 6.5
    assert registry.get_sample_value("pagedserve_request_queue_wait_seconds_sum") == 13.0
    clock.now += 31
    assert registry.get_sample_value("pagedserve_queue_wait_seconds") == 0.0


amounts = st.one_of(st.sampled_from(INTER_TOKEN_SECONDS), st.floats(0, 10))


@given(st.lists(st.tuples(amounts, st.integers(1, 5)), max_size=20))
def test_a_weighted_histogram_equals_one_that_is_fed_one_by_one(observations: list[tuple[float, int]]) -> None:
    registry = CollectorRegistry()
    weighted = WeightedHistogram("ours", "Ours.", buckets=INTER_TOKEN_SECONDS, registry=registry)
    plain = Histogram("theirs", "Theirs.", buckets=INTER_TOKEN_SECONDS, registry=registry)
    for amount, count in observations:
        weighted.observe(amount, count)
        for _ in range(count):
            plain.observe(amount)
    for bound in [*INTER_TOKEN_SECONDS, "+Inf"]:
        le = {"le": bound if isinstance(bound, str) else str(float(bound))}
        assert registry.get_sample_value("ours_bucket", le) == registry.get_sample_value("theirs_bucket", le)
    assert registry.get_sample_value("ours_count") == registry.get_sample_value("theirs_count")
    assert registry.get_sample_value("ours_sum") == pytest.approx(registry.get_sample_value("theirs_sum"))


def test_every_instrument_has_the_prefix_a_sentence_and_base_units(
    metrics: EngineMetrics, registry: CollectorRegistry
) -> None:
    metrics.observe_step(step())
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    for family in families:
        assert family.name.startswith("pagedserve_")
        assert family.documentation.endswith(".")
        assert not any(
            word in family.name for word in ("milli", "_ms", "percent", "kilo", "mega", "_kb", "_mb", "_mib")
        )
    assert len(families) > 20


def test_no_label_grows_with_traffic(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    def series() -> int:
        return sum(len(family.samples) for family in registry.collect())

    metrics.observe_step(step())
    before = series()
    for index in range(50):
        metrics.observe_step(step(num_waiting=index, queue_waits=(float(index),)))
        metrics.observe_first_token(index / 7)
        metrics.observe_inter_token(index / 11)
        metrics.observe_request(RequestStats(outcome=Outcome.ERROR, duration=float(index), generated_tokens=index))
    assert series() == before
