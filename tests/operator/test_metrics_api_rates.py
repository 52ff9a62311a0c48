from __future__ import annotations

import pytest

from pagedserve_operator.metrics_api.rates import BURST_SECONDS, MOST_CALLERS, Rates
from pagedserve_operator.metrics_api.refusals import TooManyRequests


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(rates: Rates, times: int, caller: str = "hpa") -> int:
    """How many of the requests pass."""
    passed = 0
    for _ in range(times):
        try:
            rates.take(caller)
        except TooManyRequests:
            continue
        passed += 1
    return passed


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(10, clock=clock)
    assert take(rates, 100) == 10 * BURST_SECONDS
    clock.now = 1.0
    assert take(rates, 100) == 10
    clock.now = 100.0
    assert take(rates, 100) == 10 * BURST_SECONDS


def test_callers_do_not_share() -> None:
    rates = Rates(1, clock=Clock())
    assert take(rates, 10, "one") == take(rates, 10, "other") == BURST_SECONDS


def test_a_refusal_says_how_long_to_wait_and_what_to_set() -> None:
    rates = Rates(0.1, clock=Clock())
    rates.take("hpa")
    with pytest.raises(TooManyRequests, match="METRICS_API_REQUESTS_PER_SECOND") as refused:
        rates.take("hpa")
    assert refused.value.retry_after == 10
    assert "hpa" in str(refused.value)


def test_who_waits_as_told_passes() -> None:
    clock = Clock()
    rates = Rates(0.4, clock=clock)
    rates.take("hpa")
    with pytest.raises(TooManyRequests) as refused:
        rates.take("hpa")
    clock.now += refused.value.retry_after or 0
    rates.take("hpa")


def test_asking_in_vain_costs_nothing_more() -> None:
    clock = Clock()
    rates = Rates(1, clock=clock)
    take(rates, 1000)
    clock.now = 1.0
    assert take(rates, 5) == 1


def test_only_so_many_callers_are_remembered() -> None:
    rates = Rates(1, clock=Clock())
    for number in range(2 * MOST_CALLERS):
        rates.take(f"user-{number}")
    assert len(rates) == MOST_CALLERS
