"""Synthetic loads through the real core: rows that decode together, with or without prompts coming in beside them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from random import Random

from torch.profiler import record_function

from pagedserve_engine.assembly import Core
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.profiling.timeline import STEP
from pagedserve_engine.request import RequestState, SamplingParams

WARM_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What runs while the profiler watches."""

    name: str
    batch: int
    """Rows that decode."""
    context: int
    """Tokens that each of them holds when the profiler starts."""
    steps: int
    arrivals: bool
    """Whether a prompt of ``context`` tokens comes in before every other step."""

    @property
    def description(self) -> str:
        """In words."""
        beside = f", a prompt of {self.context} tokens before every other step" if self.arrivals else ""
        return f"{self.batch} requests decode at {self.context} tokens{beside}"


class LoadRun:
    """One load on one core."""

    def __init__(self, core: Core, load: Load) -> None:
        self._core = core
        self._load = load
        self._random = Random(load.name)
        self._ids: list[str] = []
        self.num_generated = 0
        """Tokens since the start."""

    def prepare(self) -> None:
        """Bring every row to decoding. Raises ConfigError where the load does not fit into the cache."""
        load = self._load
        _check_fits(self._core, load)
        spare = 2 * load.batch + load.steps + 4 * WARM_STEPS
        rows = [self._add(max(1, load.context - WARM_STEPS), spare) for _ in range(load.batch)]
        while not all(request.output_ids for request in rows):
            self._step()
        for _ in range(WARM_STEPS):
            self._step()
        self.num_generated = 0

    def measure(self) -> float:
        """Take the load's steps, each in a span; returns seconds."""
        started = time.perf_counter()
        for step in range(self._load.steps):
            if self._load.arrivals and step % 2 == 0:
                self._add(self._load.context, 1)
            with record_function(STEP):
                self._step()
        return time.perf_counter() - started

    def end(self) -> None:
        """Cancel what runs, and step until nothing is left."""
        for request_id in self._ids:
            self._core.processor.cancel(request_id)
        while not self._core.processor.scheduler.idle:
            self._step()

    def _step(self) -> None:
        for output in self._core.processor.step()[0]:
            if output.error is not None:
                raise output.error
            self.num_generated += len(output.token_ids)

    def _add(self, prompt_tokens: int, max_tokens: int) -> RequestState:
        request = RequestState.create(
            f"{self._load.name}-{len(self._ids)}",
            [self._random.randrange(self._core.vocab_size) for _ in range(prompt_tokens)],
            SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            arrival_time=time.monotonic(),
            max_model_len=self._core.max_model_len,
        )
        self._ids.append(request.request_id)
        refused = self._core.processor.add_request(request)
        if refused is not None and refused.error is not None:
            raise refused.error
        return request


def _check_fits(core: Core, load: Load) -> None:
    scheduler = core.processor.scheduler
    length = load.context + 2 * load.batch + load.steps + 4 * WARM_STEPS
    if length > core.max_model_len:
        raise ConfigError(
            f"--context is {load.context}: with the steps of the profile a request takes {length} tokens and "
            f"MAX_MODEL_LEN is {core.max_model_len}: lower --context, --batch or --steps",
            param="context",
        )
    rows = load.batch + (load.steps // 2 + 1 if load.arrivals else 0)
    needed = rows * scheduler.cache.layout.blocks_for(length, core.plan.max_batch_tokens)
    if needed > scheduler.cache.num_total:
        raise ConfigError(
            f"--batch is {load.batch}: {rows} requests of up to {length} tokens take {needed} blocks and there are "
            f"{scheduler.cache.num_total}: lower --batch or --context, or raise NUM_BLOCKS",
            param="batch",
        )
