"""Every Prometheus instrument of the engine, and the one way to feed them.

The core reports plain numbers, one ``StepStats`` a step; the serving side reports what its clients felt. Each label
takes a few values that are known beforehand, and those series exist from the start, so that a rate has a zero to rise
from. docs/metrics.md is made from the instruments themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from pagedserve_engine.instruments import QueueWait, WeightedHistogram
from pagedserve_engine.stats import Outcome, Planned, RequestStats, StepStats

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
INTER_TOKEN_SECONDS = (
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    5,
)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 240, 600)
WAIT_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
FILL_RATIOS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
TOKENS = tuple(2**power for power in range(0, 18))


class EngineMetrics:
    """The engine's instruments, registered in ``registry``; ``clock`` gives monotonic seconds. Safe from any thread."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        # Gauges read the last step when they are scraped, so that a step costs one assignment for all of them.
        self._last = StepStats.idle(num_blocks=0)
        self._last_time = clock()
        self._prompt_count = 0
        self._cached_count = 0
        self._make_request_instruments()
        self._make_queue_instruments()
        self._make_step_instruments()
        self._make_cache_instruments()
        self._make_facts()

    def observe_step(self, step: StepStats) -> None:
        """Take in one step."""
        self._last, self._last_time = step, self._clock()
        if step.num_tokens:
            self.step_duration.observe(step.duration)
            self.batch_fill.observe(step.num_tokens / step.budget)
            # Running out of memory lowers the budget while the engine serves.
            self.max_batch_tokens.labels("actual").set(step.budget)
        for wait in step.queue_waits:
            self.queue_wait.observe(wait)
            self.recent_queue_wait.observe(wait)
        if step.prompt_tokens or step.cached_tokens:
            self._count_prompt(step.prompt_tokens, step.cached_tokens)
        for counter, amount in (
            (self.generated_tokens, step.generated_tokens),
            (self.preemptions, step.preemptions),
            (self.drafted_tokens, step.drafted_tokens),
            (self.accepted_tokens, step.accepted_tokens),
            (self.graph_replays, step.graph_replays),
            (self.graph_captures, step.graph_captures),
        ):
            if amount:
                counter.inc(amount)

    def observe_first_token(self, seconds: float) -> None:
        """Take in the time from a request's arrival to its first token, when that token leaves."""
        self.first_token.observe(seconds)

    def observe_inter_token(self, seconds: float, count: int = 1) -> None:
        """Take in ``count`` tokens, each of which came ``seconds`` after the one before."""
        self.inter_token.observe(seconds, count)

    def observe_request(self, request: RequestStats) -> None:
        """Take in a request's end. Rejected ones count by outcome only: their instant ends would flatter the rest."""
        self._outcomes[request.outcome].inc()
        if request.outcome is Outcome.REJECTED:
            return
        self.request_duration.observe(request.duration)
        self.request_prompt_tokens.observe(request.prompt_tokens)
        self.request_generated_tokens.observe(request.generated_tokens)

    def report_device_memory(self, *, used: int, total: int) -> None:
        """Bytes of the device (of the container, on a CPU) that are taken, and that there are."""
        self.device_memory_used.set(used)
        self.device_memory_limit.set(total)

    def report_settings(
        self, *, num_blocks: Planned, max_batch_tokens: Planned, max_model_len: Planned, block_size: int
    ) -> None:
        """Take in what was asked for and what memory allowed (blocks and tokens), before the first step."""
        self._last = StepStats.idle(num_blocks=num_blocks.actual)
        for gauge, planned in (
            (self.num_blocks, num_blocks),
            (self.max_batch_tokens, max_batch_tokens),
            (self.max_model_len, max_model_len),
        ):
            gauge.labels("actual").set(planned.actual)
            if planned.requested is not None:
                gauge.labels("requested").set(planned.requested)
        self.cache_info.info({"block_size": str(block_size), "num_blocks": str(num_blocks.actual)})

    def report_engine(self, *, model: str, dtype: str, attention: str, version: str) -> None:
        """Name what runs here."""
        self.engine_info.info({"model": model, "dtype": dtype, "attention": attention, "version": version})

    def _count_prompt(self, computed: int, cached: int) -> None:
        self.prompt_tokens.inc(computed)
        self.cached_tokens.inc(cached)
        self._prompt_count += computed
        self._cached_count += cached
        self.prefix_hits.set(self._cached_count / (self._prompt_count + self._cached_count))

    def _queue_wait_now(self) -> float:
        # Evaluated by each scrape: a queue that nobody serves grows older without any step.
        if not self._last.num_waiting:
            return self.recent_queue_wait.value(0.0)
        return self.recent_queue_wait.value(self._last.oldest_waiting_age + self._clock() - self._last_time)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(f"pagedserve_{name}", documentation, registry=self._registry)

    def _gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"pagedserve_{name}", documentation, labels, registry=self._registry)

    def _state_gauge(self, name: str, documentation: str, read: Callable[[StepStats], float]) -> Gauge:
        gauge = self._gauge(name, documentation)
        gauge.set_function(lambda: read(self._last))
        return gauge

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"pagedserve_{name}", documentation, buckets=buckets, registry=self._registry)

    def _make_request_instruments(self) -> None:
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_SECONDS
        )
        self.inter_token = WeightedHistogram(
            "pagedserve_inter_token_latency_seconds",
            "Between two tokens of one request; one observation for each token after the first.",
            buckets=INTER_TOKEN_SECONDS,
            registry=self._registry,
        )
        self.request_duration = self._histogram(
            "request_duration_seconds", "From a request's arrival to its end, rejected ones left out.", REQUEST_SECONDS
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request, counted at its end.", TOKENS
        )
        self.request_generated_tokens = self._histogram(
            "request_generated_tokens", "Generated tokens of a request, counted at its end.", TOKENS
        )
        self.requests = Counter(
            "pagedserve_requests",
            "Ended requests: stop (end of text or a stop string), length, cancelled (the client left), timeout, error "
            "(the engine's doing), rejected (valid and not accepted: too long, queue full, draining).",
            ["outcome"],
            registry=self._registry,
        )
        self._outcomes = {outcome: self.requests.labels(outcome.value) for outcome in Outcome}

    def _make_queue_instruments(self) -> None:
        self.running = self._state_gauge(
            "requests_running", "Sequences that hold blocks and take part in steps.", lambda step: step.num_running
        )
        self.waiting = self._state_gauge(
            "requests_waiting", "Sequences in the queue, preempted ones included.", lambda step: step.num_waiting
        )
        self.queue_wait = self._histogram(
            "request_queue_wait_seconds", "From a request's arrival to its first step.", WAIT_SECONDS
        )
        self.recent_queue_wait = QueueWait(self._clock)
        self.current_queue_wait = self._gauge(
            "queue_wait_seconds",
            "The larger of the mean queue wait over 30 s and the age of the oldest that waits: for autoscaling.",
        )
        self.current_queue_wait.set_function(self._queue_wait_now)

    def _make_step_instruments(self) -> None:
        self.step_duration = self._histogram("step_duration_seconds", "One step: schedule, run, commit.", STEP_SECONDS)
        self.batch_fill = self._histogram(
            "batch_fill_ratio", "Scheduled tokens of a step ÷ its token budget.", FILL_RATIOS
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens computed; those computed again after a preemption count again."
        )
        self.generated_tokens = self._counter("generated_tokens", "Tokens sampled.")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens that the prefix cache answered.")
        self.prefix_hits = self._gauge(
            "prefix_hit_ratio",
            "Cached ÷ (cached + computed) prompt tokens since the start; the counters give it for a time.",
        )
        self.preemptions = self._counter("preemptions", "Running sequences put back into the queue for want of blocks.")
        self.drafted_tokens = self._counter("drafted_tokens", "Tokens that speculation guessed and a step computed.")
        self.accepted_tokens = self._counter("accepted_tokens", "Guessed tokens that were right and saved a step each.")
        self.graph_replays = self._counter("graph_replays", "Steps that replayed a CUDA graph.")
        self.graph_captures = self._counter("graph_captures", "CUDA graphs captured.")

    def _make_cache_instruments(self) -> None:
        self.blocks_total = self._state_gauge(
            "blocks", "Blocks of the pool but for the null block: free + referenced.", lambda step: step.blocks_total
        )
        self.blocks_free = self._state_gauge(
            "blocks_free", "Blocks that no sequence holds, cached ones included.", lambda step: step.blocks_free
        )
        self.blocks_referenced = self._state_gauge(
            "blocks_referenced", "Blocks that sequences hold.", lambda step: step.blocks_referenced
        )
        self.blocks_cached = self._state_gauge(
            "blocks_cached", "Free blocks that keep a prefix to be found again.", lambda step: step.blocks_cached
        )
        self.cache_usage = self._state_gauge(
            "cache_usage_ratio",
            "Referenced ÷ all blocks: cached blocks are free to take.",
            lambda step: step.blocks_referenced / max(step.blocks_total, 1),
        )
        self.device_memory_used = self._gauge("device_memory_used_bytes", "Memory taken on the device.")
        self.device_memory_limit = self._gauge(
            "device_memory_limit_bytes", "Memory of the device, or of the container on a CPU."
        )

    def _make_facts(self) -> None:
        kind = ["kind"]
        self.num_blocks = self._gauge("num_blocks", "NUM_BLOCKS; no requested value where it was auto.", kind)
        self.max_batch_tokens = self._gauge("max_batch_tokens", "MAX_BATCH_TOKENS, in the same way.", kind)
        self.max_model_len = self._gauge("max_model_len", "MAX_MODEL_LEN in tokens, in the same way.", kind)
        self.engine_info = Info("pagedserve_engine", "What runs here.", registry=self._registry)
        self.cache_info = Info(
            "pagedserve_cache", "Shape of the cache, for the gateway's protocol.", registry=self._registry
        )
