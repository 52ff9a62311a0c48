"""Exactness on a CUDA device: the same engine, the reference on the same device in the same dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import load_reference, tiny_model
from pagedserve_engine.memory import available_memory
from stepping import Exactness, SteppedEngine

pytestmark = pytest.mark.gpu

TINY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
@pytest.mark.parametrize("name", TINY)
def test_every_family_is_exact_on_the_device(name: str, scheduler: str) -> None:
    folder = tiny_model(name)[1]
    engine = SteppedEngine(
        folder, device="cuda", block_size=8, num_blocks=200, max_batch_tokens=40, scheduler=scheduler, max_model_len=128
    )
    rng = np.random.default_rng(0)
    for length in (1, 9, 17, 40, 33, 70):
        engine.add(rng.integers(3, engine.core.vocab_size, length).tolist(), 12)
    engine.run()
    Exactness(load_reference(folder).to("cuda")).check_all(engine)


def test_the_plan_counts_what_the_device_reports() -> None:
    before = available_memory("cuda")
    engine = SteppedEngine(tiny_model("llama")[1], device="cuda", num_blocks=20_000)
    taken = before.free - available_memory("cuda").free
    plan = engine.core.plan
    assert plan.cache <= taken
    assert torch.cuda.memory_reserved() <= plan.used + (256 << 20)
