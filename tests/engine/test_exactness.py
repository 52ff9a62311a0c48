"""Greedy output equals the model alone, whatever is batched beside it, chunked, cached or preempted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from models import gemma3_folder, load_reference, reference_logits, smollm2_folder, tiny_model
from stepping import Exactness, SteppedEngine

TINY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")
REAL = {"smollm2": smollm2_folder, "gemma3-270m": gemma3_folder}


@cache
def exactness(folder: Path) -> Exactness:
    return Exactness(load_reference(folder))


def prompts(vocab_size: int, lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, length).tolist() for length in lengths]


def mix(folder: Path, *, lengths: tuple[int, ...], max_tokens: int, seed: int, **options: Any) -> SteppedEngine:
    """Requests that arrive two by two, one of them cancelled on the way; shares a prefix between some."""
    engine = SteppedEngine(folder, **options)
    asked = prompts(engine.core.vocab_size, lengths, seed)
    asked.append([*asked[-1][: len(asked[-1]) // 2], *asked[0]])
    doomed = engine.add(asked[0][::-1], max_tokens)
    for at, prompt in enumerate(asked):
        engine.add(prompt, max_tokens)
        if at % 2:
            engine.step()
            engine.step()
    engine.cancel(doomed)
    engine.run()
    # The same prompts again find their prefixes cached.
    for prompt in asked[-2:]:
        engine.add(prompt, max_tokens)
    engine.run()
    return engine


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
@pytest.mark.parametrize("shape", [(4, 600, 24, 0), (16, 200, 7, 1), (1, 1500, 64, 1)])
@pytest.mark.parametrize("name", TINY)
def test_every_family_is_exact_in_any_mix(name: str, shape: tuple[int, int, int, int], scheduler: str) -> None:
    block_size, num_blocks, budget, steps_in_flight = shape
    folder = tiny_model(name)[1]
    engine = mix(
        folder,
        lengths=(1, 9, 17, 40, 33, 70),
        max_tokens=10,
        seed=budget,
        block_size=block_size,
        num_blocks=num_blocks,
        max_batch_tokens=budget,
        scheduler=scheduler,
        max_model_len=128,
        steps_in_flight=steps_in_flight,
    )
    exactness(folder).check_all(engine)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("name", "num_blocks"), [("llama", 32), ("mistral", 20), ("gemma2", 40), ("gemma3", 80)])
def test_preemption_changes_no_token(name: str, num_blocks: int, depth: int) -> None:
    folder = tiny_model(name)[1]
    options = {"block_size": 4, "num_blocks": num_blocks, "max_batch_tokens": 32, "safety_margin": 0.0}
    engine = SteppedEngine(folder, steps_in_flight=depth, **options)
    for prompt in prompts(engine.core.vocab_size, (12, 8, 14, 9, 11, 7), seed=3):
        engine.add(prompt, 14)
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    exactness(folder).check_all(engine)


@pytest.mark.parametrize("name", TINY)
def test_teacher_forced_log_probabilities_agree(name: str) -> None:
    # In float32 these models' logits lie up to 1.4e-5 from those in float64, transformers' own forward pass included.
    _teacher_forced(tiny_model(name)[1], length=60, tolerance=2e-5, block_size=8, max_batch_tokens=13)


@pytest.mark.real_model
@pytest.mark.parametrize("name", REAL)
def test_real_models_agree_when_teacher_forced(name: str) -> None:
    _teacher_forced(REAL[name](), length=700, tolerance=1e-3, block_size=32, max_batch_tokens=190, num_blocks=200)


def _teacher_forced(folder: Path, *, length: int, tolerance: float, **options: Any) -> None:
    engine = SteppedEngine(folder, **options)
    prompt = prompts(engine.core.vocab_size, (length,), seed=1)[0]
    request_id = engine.add(prompt, 1, prompt_logprobs=20)
    engine.run()
    scored = engine.news[request_id][0].prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    expected = torch.log_softmax(reference_logits(load_reference(folder), prompt).float(), -1)
    for at, entry in enumerate(scored[1:]):
        assert entry is not None
        assert entry.token_id == prompt[at + 1]
        got = torch.tensor([entry.logprob, *(value for _, value in entry.top)])
        want = expected[at][[entry.token_id, *(token for token, _ in entry.top)]]
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0.0)


@pytest.mark.real_model
@pytest.mark.parametrize(("scheduler", "depth"), [("fifo", 1), ("prefill_first", 0)])
@pytest.mark.parametrize("name", REAL)
def test_real_models_are_exact_in_a_mix_with_tiny_caches(name: str, scheduler: str, depth: int) -> None:
    folder = REAL[name]()
    # Gemma's pool serves six groups, and its window of 512 is crossed by the longest prompt.
    num_blocks = {"smollm2": 48, "gemma3-270m": 300}[name]
    engine = mix(
        folder,
        lengths=(5, 80, 200, 33, 560),
        max_tokens=20,
        seed=5,
        block_size=16,
        num_blocks=num_blocks,
        max_batch_tokens=128,
        safety_margin=0.0,
        scheduler=scheduler,
        steps_in_flight=depth,
    )
    exactness(folder).check_all(engine)


@settings(max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
class ExactnessMachine(RuleBasedStateMachine):
    """Arrivals, cancellations and evictions in any order on hybrid and plain tiny models."""

    @initialize(
        name=st.sampled_from(["llama", "gemma3", "mistral"]),
        block_size=st.sampled_from([1, 4, 8, 32]),
        budget=st.integers(3, 40),
        scheduler=st.sampled_from(["fifo", "prefill_first"]),
        pages=st.integers(120, 400),
        depth=st.integers(0, 1),
    )
    def build(self, name: str, block_size: int, pages: int, **options: Any) -> None:
        self.folder = tiny_model(name)[1]
        groups = {"llama": 1, "gemma3": 6, "mistral": 1}[name]
        self.engine = SteppedEngine(
            self.folder,
            block_size=block_size,
            num_blocks=groups * (3 + pages // block_size),
            max_batch_tokens=options["budget"],
            scheduler=options["scheduler"],
            safety_margin=0.1,
            steps_in_flight=options["depth"],
        )

    @rule(family=st.integers(0, 3), length=st.integers(1, 60), max_tokens=st.integers(1, 8))
    def arrive(self, family: int, length: int, max_tokens: int) -> None:
        prompt = prompts(self.engine.core.vocab_size, (64,), seed=family)[0][:length]
        if len(prompt) + max_tokens <= self.engine.core.max_model_len:
            self.engine.add(prompt, max_tokens)

    @rule(steps=st.integers(1, 4))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.engine.requests:
            self.engine.cancel(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        self.engine.scheduler.cache.evict_cached(count)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run()
            exactness(self.folder).check_all(self.engine)


TestExactness = ExactnessMachine.TestCase
