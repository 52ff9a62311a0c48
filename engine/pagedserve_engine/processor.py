"""One step after another: schedule, launch, read, commit. No thread, no event loop, no clock but for measuring.

With ``steps_in_flight`` 0 a step is read as soon as it is launched. With 1 the next step is scheduled and launched
first, so that the device has work while the host reads: the scheduler then speaks of what was launched, the requests'
outputs of what was read, and everything between belongs to the steps in flight, which this module alone holds.

A launch that fails is a step that fails when it is read, after those before it, so that they lose nothing. A step that
fails takes those launched after it with it: their results are void, and requests that only these ran are computed
again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pagedserve_engine.batch import Batch, PendingStep, StepOutput
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

    def launch(self, batch: Batch) -> PendingStep:
        """Queue one step on the device without waiting for it.

        Raises OutOfDeviceMemoryError, DeviceFailedError, or anything for a failed step.
        """


class Peers(Protocol):
    """Processes that compute with this one."""

    def check(self) -> None:
        """Raise DeviceFailedError where one of them has failed."""

    def on_failure(self, wake: Callable[[], object]) -> None:
        """Call ``wake``, on any thread, once ``check`` raises."""

    def close(self) -> None:
        """End them; may be called again."""


@dataclass(frozen=True, slots=True)
class _FailedLaunch:
    """A step that never began."""

    error: Exception

    def read(self) -> StepOutput:
        """Raises what the launch raised."""
        raise self.error


class ContinuousBatchProcessor:
    """Owns the scheduler and the runner; every call is made by one thread."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, *, steps_in_flight: int = 0, peers: Peers | None = None
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._peers = peers
        self.steps_in_flight = steps_in_flight
        """Steps that may be launched and not read while the next one is scheduled."""
        self._pending: deque[tuple[Batch, PendingStep]] = deque()
        """What is in flight, the oldest first; the scheduler counts the same batches."""
        self._failed_steps = 0
        self._preemptions_seen = 0
        self._drafts_seen = 0, 0
        self._last_read: float | None = None
        """When the last results came, while there is work."""
        self._waited = 0.0
        self._replays = 0

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

    def on_failure(self, wake: Callable[[], object]) -> None:
        """Call ``wake``, on any thread, when the next step will raise although there is nothing to do."""
        if self._peers is not None:
            self._peers.on_failure(wake)

    def close(self) -> None:
        """End the processes that compute with this one, if any; the last call."""
        if self._peers is not None:
            self._peers.close()

    def prepare_next_batch(self) -> Batch | None:
        """What the next step runs; None where there is nothing to do, or nothing before a step in flight is read."""
        batch = self.scheduler.schedule()
        assert batch is not None or self._pending or self.scheduler.idle, "requests wait and none can run"
        return batch

    def update_batch(self, batch: Batch, output: StepOutput) -> list[GenerationOutput]:
        """Take in what a step computed."""
        return self.scheduler.commit(batch, output)

    def fail_all_requests(self, error: PagedServeError) -> list[GenerationOutput]:
        """End every request with ``error``; what is in flight is dropped when it is read."""
        return self.scheduler.fail_all(error)

    def step(self) -> tuple[list[GenerationOutput], StepStats]:
        """Launch one step, and read the one before; returns the news and figures (of no tokens where nothing ran).

        A step that fails ends the requests in it and no other. Raises DeviceFailedError where going on is pointless.
        """
        if self._peers is not None:
            self._peers.check()
        started = time.perf_counter()
        self._waited = gap = 0.0
        self._replays = 0
        outputs: list[GenerationOutput] = []
        batch = self.prepare_next_batch()
        allowed = 0
        if batch is not None:
            pending = self._launch(batch)
            if not self._pending and self._last_read is not None:
                gap = time.perf_counter() - self._last_read
            self._pending.append((batch, pending))
            allowed = 0 if batch.read_first or isinstance(pending, _FailedLaunch) else self.steps_in_flight
        while len(self._pending) > allowed:
            outputs += self._read_oldest()
        if self.scheduler.idle:
            self._last_read = None
        return outputs, self._measure(batch, outputs, duration=time.perf_counter() - started, gap=gap)

    def _launch(self, batch: Batch) -> PendingStep:
        try:
            return self._runner.launch(batch)
        except Exception as error:
            return _FailedLaunch(error)

    def _read_oldest(self) -> list[GenerationOutput]:
        batch, pending = self._pending.popleft()
        asked = time.perf_counter()
        try:
            output = pending.read()
        except DeviceFailedError:
            raise
        except OutOfDeviceMemoryError as error:
            self._void_pending()
            return self._lower_batch(batch, error)
        except Exception as error:
            self._void_pending()
            return self._fail_step(batch, error)
        now = time.perf_counter()
        self._last_read, self._waited = now, self._waited + now - asked
        self._failed_steps = 0
        self._replays += output.replayed
        return self.update_batch(batch, output)

    def _void_pending(self) -> None:
        """Take back what was launched after a step that failed: it may have read what was never written."""
        while self._pending:
            batch, pending = self._pending.pop()
            try:
                pending.read()
            except DeviceFailedError:
                raise
            except Exception as error:
                logger.warning("a step failed that followed a failed one, and is computed again: %s", error)
            self.scheduler.retry_batch(batch, context_holds=False)

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

    def _measure(
        self, batch: Batch | None, outputs: list[GenerationOutput], *, duration: float, gap: float
    ) -> StepStats:
        scheduler, cache = self.scheduler, self.scheduler.cache
        oldest = scheduler.oldest_arrival()
        preemptions = scheduler.num_preemptions - self._preemptions_seen
        self._preemptions_seen = scheduler.num_preemptions
        drafted, accepted = self._drafts_seen
        self._drafts_seen = scheduler.num_drafted, scheduler.num_accepted
        generated = sum([len(news.token_ids) for news in outputs])
        return StepStats(
            duration=duration,
            wait=self._waited,
            gap=gap,
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
            drafted_tokens=scheduler.num_drafted - drafted,
            accepted_tokens=scheduler.num_accepted - accepted,
            graph_replays=self._replays,
        )


def _cached(batch: Batch, row: int) -> int:
    """Prompt tokens that an admitted row found in the cache."""
    return min(int(batch.context_lens[row]), len(batch.requests[row].prompt_ids))


def refusal(request_id: str, error: PagedServeError) -> GenerationOutput:
    """The news of a request that ends with ``error`` before it began."""
    return GenerationOutput(request_id, finish_reason=FinishReason.ERROR, error=error)
