"""The engine as the server sees it, on a shadow runner: real queues, real text, no model, and steps on command."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from fake_engine import FakeDetokenizer, FakeTokenizer
from pagedserve_engine.assembly import Core
from pagedserve_engine.batch import Batch, PendingStep
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.frontend import AsyncEngine
from pagedserve_engine.memory import MemoryPlan
from pagedserve_engine.metrics import EngineMetrics
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.request import SamplingParams
from pagedserve_engine.stream import TextStream
from pagedserve_engine.text import TextOutput, TextRequest
from shadow import ShadowRunner, expected_output, shadow_processor

LETTERS = 128
"""The vocabulary: every token is an ASCII character."""

SECONDS = 30.0
"""Bound of every wait; none is expected to come near it."""


class Letters(FakeTokenizer):
    """A token is a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def detokenizer(self, *, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> FakeDetokenizer:
        return FakeDetokenizer()


class SteppedRunner:
    """Passes steps on to ``inner``; once held, only as many as it is let."""

    def __init__(self, inner: ShadowRunner) -> None:
        self.inner = inner
        self.held = False
        self.entered = threading.Semaphore(0)
        """Released once for each step that is held."""
        self._let = threading.Semaphore(0)

    def launch(self, batch: Batch) -> PendingStep:
        if self.held:
            self.entered.release()
            self._let.acquire()
        return self.inner.launch(batch)

    def let(self, steps: int) -> None:
        self._let.release(steps)

    def release(self) -> None:
        """Hold no more."""
        self.held = False
        self._let.release(1000)


@dataclass
class ShadowEngine:
    """An AsyncEngine that runs, and what lies behind it."""

    engine: AsyncEngine
    processor: ContinuousBatchProcessor
    runner: ShadowRunner
    steps: SteppedRunner
    registry: CollectorRegistry

    def submit(self, *prompts: str, max_tokens: int = 8, **fields: Any) -> list[TextStream]:
        return self.engine.submit([ask(prompt, max_tokens=max_tokens, **fields) for prompt in prompts])

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value."""
        value = self.registry.get_sample_value(f"pagedserve_{name}", labels)
        assert value is not None, name
        return value

    def outcomes(self) -> dict[str, int]:
        """Ended requests by outcome, those that there are."""
        names = ("stop", "length", "cancelled", "timeout", "error", "rejected")
        counts = {name: int(self.sample("requests_total", outcome=name)) for name in names}
        return {name: count for name, count in counts.items() if count}

    async def entered(self) -> None:
        """Wait until a held step has begun."""
        await until(lambda: self.steps.entered.acquire(blocking=False), "a step")

    async def one_step(self) -> None:
        """Let the held step run, and wait until its news is here and the next one is held."""
        self.steps.let(1)
        await self.entered()
        await asyncio.sleep(0)


def ask(prompt: str, *, max_tokens: int = 8, stop: Sequence[str] = (), **fields: Any) -> TextRequest:
    """A greedy request; its id is its prompt unless one is given."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields.pop("params", {}))
    fields.setdefault("request_id", prompt)
    return TextRequest(prompt_ids=list(prompt.encode()), params=params, stop=tuple(stop), **fields)


def answer(prompt: str, num_tokens: int = 8) -> str:
    """What the shadow says."""
    return bytes(expected_output(list(prompt.encode()), num_tokens, LETTERS)).decode()


async def read(stream: TextStream) -> list[TextOutput]:
    """All outputs, within bounds; the stream is closed."""
    try:
        async with asyncio.timeout(SECONDS):
            return [output async for output in stream]
    finally:
        stream.close()


async def text_of(stream: TextStream) -> str:
    return "".join(output.text for output in await read(stream))


async def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Let the loop turn until ``condition`` holds."""
    try:
        async with asyncio.timeout(SECONDS):
            while not condition():  # noqa: ASYNC110 - what is waited for happens on the core's thread, which sets no event
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"{what} did not come about") from None


def shadow_core(**options: Any) -> tuple[Core, ShadowRunner, SteppedRunner]:
    """A core of one full layer group, without end tokens; ``options`` as ``shadow_processor``."""
    processor, runner = shadow_processor(**options)
    runner.vocab_size = LETTERS
    steps = SteppedRunner(runner)
    processor._runner = steps
    scheduler = processor.scheduler
    num_blocks = scheduler.cache.num_total + 1
    core = Core(
        processor=processor,
        runner=runner,  # type: ignore[arg-type]
        name="shadow",
        spec=_spec(scheduler.max_model_len),
        tokenizer=Letters(),  # type: ignore[arg-type]
        grammars=None,
        plan=_plan(num_blocks, scheduler.max_batch_tokens, scheduler.max_model_len),
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention="shadow",
    )
    return core, runner, steps


@asynccontextmanager
async def shadow_engine(config: EngineConfig | None = None, **options: Any) -> AsyncIterator[ShadowEngine]:
    """A started engine; what ``config`` says of sequences at once holds for the core as well."""
    shadow = make_shadow(config, **options)
    await shadow.engine.start()
    try:
        yield shadow
    finally:
        shadow.steps.release()
        await shadow.engine.close()


def make_shadow(config: EngineConfig | None = None, **options: Any) -> ShadowEngine:
    """An engine that is not started."""
    config = config or EngineConfig(max_num_seqs=8)
    core, runner, steps = shadow_core(max_num_seqs=config.max_num_seqs, **options)
    registry = CollectorRegistry()
    engine = AsyncEngine(config, EngineMetrics(registry), build=lambda _: core)
    return ShadowEngine(engine, core.processor, runner, steps, registry)


def _spec(max_model_len: int) -> ModelSpec:
    return ModelSpec(
        architecture="shadow",
        num_layers=1,
        layer_types=("full",),
        sliding_window=None,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        hidden_size=2,
        intermediate_size=2,
        vocab_size=LETTERS,
        max_position_embeddings=max_model_len,
        softcap=None,
        tie_word_embeddings=False,
        num_parameters=1,
        num_active_parameters=1,
        eos_token_ids=(),
    )


def _plan(num_blocks: int, max_batch_tokens: int, max_model_len: int) -> MemoryPlan:
    return MemoryPlan(
        total=1 << 30,
        budget=1 << 30,
        weights=0,
        activations=0,
        static_buffers=0,
        graphs=0,
        cache=0,
        block_size=4,
        block_bytes=64,
        requested_num_blocks=num_blocks,
        num_blocks=num_blocks,
        requested_max_batch_tokens=max_batch_tokens,
        max_batch_tokens=max_batch_tokens,
        requested_max_model_len="auto",
        max_model_len=max_model_len,
        longest_sequence=None,
    )
