"""How often each caller may ask: a bucket of tokens for each, refilled all the time."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from pagedserve_operator.metrics_api.refusals import TooManyRequests

BURST_SECONDS: Final = 2.0
"""A caller that was quiet may ask at once for what it may ask for in so long."""
MOST_CALLERS: Final = 1_000


class Rates:
    """``per_second`` requests for each caller; of more than MOST_CALLERS the quietest are forgotten."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._full = max(1.0, per_second * BURST_SECONDS)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Callers that are remembered."""
        return len(self._buckets)

    def take(self, caller: str) -> None:
        """Count a request; raises TooManyRequests."""
        now = self._clock()
        tokens, at = self._buckets.pop(caller, (self._full, now))
        tokens = min(self._full, tokens + (now - at) * self._per_second)
        self._buckets[caller] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = max(1, math.ceil((1 - tokens) / self._per_second))
            raise TooManyRequests(
                f"{caller} asks more than {self._per_second:g} times a second for metrics: wait {wait} s, or raise "
                "METRICS_API_REQUESTS_PER_SECOND of the operator",
                retry_after=wait,
            )
