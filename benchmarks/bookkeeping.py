"""Time of one step's bookkeeping: a real scheduler and cache, and a model that answers at once.

Every request is decoding when the clock starts, and none ends while it runs; a step is schedule, a runner that returns
one token for each row, and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.workloads import FIRST_TOKEN_ID
from pagedserve_engine.batch import Batch, ReadyStep, StepOutput
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.request import RequestState, SamplingParams
from pagedserve_engine.scheduler.scheduler import Scheduler

PROMPT_TOKENS = 100
MEASURED_STEPS = 256
WARM_STEPS = 64
OUTPUT_TOKENS = 1_024
"""More than the steps until the last request is admitted, the warm ones and the measured ones together."""
MAX_MODEL_LEN = 2_048
BLOCK_SIZE = 32
SIZES = (256, 512, 1_024)


class NoModel:
    """Answers every sampled row with the same token."""

    def launch(self, batch: Batch) -> ReadyStep:
        """One token for each sampled row, at once."""
        tokens = np.full(int(batch.sampled.sum()), FIRST_TOKEN_ID, dtype=np.int32)
        return ReadyStep(StepOutput(token_ids=tokens, logprobs={}, prompt_logprobs={}, failed={}))


def build_processor(num_running: int, steps_in_flight: int) -> ContinuousBatchProcessor:
    """A processor with ``num_running`` requests of ``PROMPT_TOKENS`` tokens, their prefill done."""
    layout = CacheLayout.build(
        ["full"] * 30, window=None, num_kv_heads=3, head_dim=64, block_size=BLOCK_SIZE, dtype_bytes=2
    )
    blocks = 1 + num_running * (-(-(PROMPT_TOKENS + OUTPUT_TOKENS) // BLOCK_SIZE) + 1)
    cache = CacheManager(layout, num_blocks=blocks, max_num_seqs=num_running, max_model_len=MAX_MODEL_LEN)
    scheduler = Scheduler(
        cache,
        policy="fifo",
        max_batch_tokens=2_048,
        max_num_seqs=num_running,
        max_model_len=MAX_MODEL_LEN,
        safety_margin=0.0,
        eos_token_ids=[2],
    )
    processor = ContinuousBatchProcessor(scheduler, NoModel(), steps_in_flight=steps_in_flight)
    for index in range(num_running):
        prompt = [FIRST_TOKEN_ID + index] + [FIRST_TOKEN_ID] * (PROMPT_TOKENS - 1)
        request = RequestState.create(
            f"request-{index}",
            prompt,
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=OUTPUT_TOKENS),
            arrival_time=time.monotonic(),
            max_model_len=MAX_MODEL_LEN,
        )
        refused = processor.add_request(request)
        assert refused is None, refused
    # A step admits what its token budget has room for; after that, everything decodes.
    while scheduler.num_waiting:
        processor.step()
    for _ in range(WARM_STEPS):
        processor.step()
    return processor


def milliseconds_per_step(num_running: int, steps_in_flight: int) -> tuple[float, float]:
    """Median and 99th percentile over ``MEASURED_STEPS`` steps of decoding alone."""
    processor = build_processor(num_running, steps_in_flight)
    assert processor.scheduler.num_running == num_running
    durations = []
    for _ in range(MEASURED_STEPS):
        started = time.perf_counter()
        processor.step()
        durations.append(1_000 * (time.perf_counter() - started))
    assert processor.scheduler.num_running == num_running, "a request ended while the clock ran"
    return statistics.median(durations), statistics.quantiles(durations, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="*", default=list(SIZES), help="requests that run")
    parser.add_argument("--in-flight", type=int, default=0, help="steps launched before the oldest is read")
    arguments = parser.parse_args()
    for size in arguments.running:
        median, tail = milliseconds_per_step(size, arguments.in_flight)
        print(json.dumps({"running": size, "median_ms": median, "p99_ms": tail}), flush=True)


if __name__ == "__main__":
    main()
