"""One step after another: schedule, run, commit. No thread, no event loop, no clock but for measuring."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from pagedserve_engine.batch import Batch, StepOutput
from pagedserve_engine.errors import (
    DeviceFailedError,
    EngineError,
    OutOfDeviceMemoryError,
    PagedServeError,
    StepFailedError,
)
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState
from pagedserve_engine.scheduler.scheduler import Scheduler
from pagedserve_engine.stats import StepStats

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 8
"""Steps that may fail one after another before the device counts as broken."""


class Runner(Protocol):
    """What runs a batch; ``ModelRunner`` but for tests and benchmarks."""

    def run(self, batch: Batch) -> StepOutput:
        """Compute one step. Raises OutOfDeviceMemoryError, DeviceFailedError, or anything for a failed step."""


class ContinuousBatchProcessor:
    """Owns the scheduler and the runner; every call is made by one thread."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._failed_steps = 0
        self._preemptions_seen = 0

    def add_request(self, request: RequestState) -> GenerationOutput | None:
        """Queue ``request``; the answer is its refusal, if it can never fit."""
        try:
            self.scheduler.add(request)
        except PagedServeError as error:
            return refusal(request.request_id, error)
        return None

    def cancel(self, request_id: str) -> GenerationOutput | None:
        """End a request; its blocks are free on return. None where it had ended."""
        return self.scheduler.cancel(request_id)

    def prepare_next_batch(self) -> Batch | None:
        """What the next step runs; None where there is nothing to do."""
        batch = self.scheduler.schedule()
        assert batch is not None or self.scheduler.idle, "requests wait and none can run"
        return batch

    def update_batch(self, batch: Batch, output: StepOutput) -> list[GenerationOutput]:
        """Take in what a step computed."""
        return self.scheduler.commit(batch, output)

    def fail_all_requests(self, error: PagedServeError) -> list[GenerationOutput]:
        """End every request with ``error``."""
        return self.scheduler.fail_all(error)

    def step(self) -> tuple[list[GenerationOutput], StepStats]:
        """Run one step; returns the requests' news and the step's figures (of no tokens where there was nothing to do).

        A step that fails ends the requests in it and no other. Raises DeviceFailedError where going on is pointless.
        """
        started = time.perf_counter()
        batch = self.prepare_next_batch()
        if batch is None:
            return [], self._measure(None, [], 0.0)
        try:
            output = self._runner.run(batch)
        except OutOfDeviceMemoryError as error:
            outputs = self._lower_batch(batch, error)
        except DeviceFailedError:
            raise
        except Exception as error:
            outputs = self._fail_step(batch, error)
        else:
            self._failed_steps = 0
            outputs = self.update_batch(batch, output)
        return outputs, self._measure(batch, outputs, time.perf_counter() - started)

    def _lower_batch(self, batch: Batch, error: OutOfDeviceMemoryError) -> list[GenerationOutput]:
        if batch.num_tokens == 1:
            raise DeviceFailedError(f"out of device memory even for one token a step: {error}") from error
        lowered = batch.num_tokens // 2
        logger.warning("out of device memory: MAX_BATCH_TOKENS lowered from %d to %d", batch.num_tokens, lowered)
        self.scheduler.max_batch_tokens = lowered
        self.scheduler.retry_batch(batch)
        return []

    def _fail_step(self, batch: Batch, error: Exception) -> list[GenerationOutput]:
        logger.error("step failed, %d requests end with it", len(batch.requests), exc_info=error)
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise DeviceFailedError(f"{self._failed_steps} steps failed in a row, the last with: {error}") from error
        cause = error if isinstance(error, EngineError) else StepFailedError(f"the step failed: {error}")
        return self.scheduler.fail_batch(batch, cause)

    def _measure(self, batch: Batch | None, outputs: list[GenerationOutput], duration: float) -> StepStats:
        scheduler, cache = self.scheduler, self.scheduler.cache
        oldest = scheduler.oldest_arrival()
        preemptions = scheduler.num_preemptions - self._preemptions_seen
        self._preemptions_seen = scheduler.num_preemptions
        generated = sum(len(news.token_ids) for news in outputs)
        return StepStats(
            duration=duration,
            num_tokens=0 if batch is None else batch.num_tokens,
            budget=scheduler.max_batch_tokens,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            oldest_waiting_age=0.0 if oldest is None else max(0.0, time.monotonic() - oldest),
            queue_waits=scheduler.take_queue_waits(),
            blocks_free=cache.num_free,
            blocks_referenced=cache.num_referenced,
            blocks_cached=cache.num_cached,
            blocks_total=cache.num_total,
            prompt_tokens=0 if batch is None else batch.num_tokens - batch.num_decodes,
            generated_tokens=generated,
            cached_tokens=0 if batch is None else sum(_cached(batch, row) for row in batch.admitted),
            preemptions=preemptions,
        )


def _cached(batch: Batch, row: int) -> int:
    """Prompt tokens that an admitted row found in the cache."""
    return min(int(batch.context_lens[row]), len(batch.requests[row].prompt_ids))


def refusal(request_id: str, error: PagedServeError) -> GenerationOutput:
    """The news of a request that ends with ``error`` before it began."""
    return GenerationOutput(request_id, finish_reason=FinishReason.ERROR, error=error)
