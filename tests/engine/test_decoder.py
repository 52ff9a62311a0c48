"""The fused decoder says what transformers' modules say, for every family that it covers and odd settings of each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decoders import OneSequence, Ranks, ThreadCollective, fused
from models import load_reference, reference_logits, tiny_model
from pagedserve_engine.model.decoder import FusedDecoder

IDS: list[int] = np.random.default_rng(11).integers(3, 256, 60).tolist()

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 6.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.35,
    "attention_multiplier": 0.11,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with every bias and tied embeddings": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama with heads of their own size": ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "llama 3's rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "dynamic rope below its switch": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "mistral's window": ("mistral", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases and a window": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "gemma": ("llama", {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "gemma 2": ("gemma2", {}),
    "gemma 2 without caps, with biases": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma 2 with another scale": ("gemma2", {"query_pre_attn_scalar": 50}),
    "gemma 3": ("gemma3", {}),
    "gemma 3 tied, with capped logits": ("gemma3", {"tie_word_embeddings": True, "final_logit_softcapping": 8.0}),
    "phi 3": ("phi3", {}),
    "phi 3 with a window and few key heads": ("phi3", {"sliding_window": 16, "num_key_value_heads": 1}),
    "phi 3 that turns half of each head": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi 3's long rope below its switch": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256},
    ),
    "granite": ("llama", GRANITE),
    "granite with biases": ("llama", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "smollm3 with layers that turn nothing": ("llama", {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}),
}


def folder_of(case: str) -> Path:
    name, overrides = CASES[case]
    return tiny_model(name, **overrides)[1]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_modules(case: str) -> None:
    folder = folder_of(case)
    expected = reference_logits(load_reference(folder), IDS)
    sequence = OneSequence(fused(folder))
    # A prompt in chunks, of which the first wants nothing, and two steps of decoding.
    nothing = sequence.run(IDS[:21], [])
    some = sequence.run(IDS[21:50], [28, 3, 4])
    every = sequence.run(IDS[50:58])
    last = torch.cat([sequence.run(IDS[at : at + 1], [0]) for at in (58, 59)])
    assert nothing.shape == (0, 256)
    got = torch.cat([some, every, last])
    want = expected[[49, 24, 25, *range(50, 60)]]
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["llama", "gemma 3 tied, with capped logits", "granite", "qwen2 tied"])
def test_16_bit_logits_stay_close_to_transformers_modules(case: str) -> None:
    folder = folder_of(case)
    expected = reference_logits(load_reference(folder, dtype=torch.bfloat16), IDS)
    exact = reference_logits(load_reference(folder), IDS)
    got = OneSequence(fused(folder, dtype=torch.bfloat16)).run(IDS)
    assert got.dtype == torch.bfloat16
    ours, theirs = (got.float() - exact).abs().mean(), (expected.float() - exact).abs().mean()
    assert ours < 1.3 * theirs, "rounding costs more than in transformers' modules"


WORLDS = [
    ("llama with every bias and tied embeddings", 2),
    ("llama with one key head", 4),
    ("qwen3 with biases and a window", 2),
    ("gemma 2", 2),
    ("phi 3", 4),
    ("granite with biases", 2),
]


@pytest.mark.parametrize(("case", "world"), WORLDS)
def test_ranks_together_say_what_one_says(case: str, world: int) -> None:
    folder = folder_of(case)
    whole = OneSequence(fused(folder)).run(IDS)
    ranks = Ranks(world)

    def run(rank: int) -> torch.Tensor:
        model = fused(folder, rank=rank, world=world, collective=ThreadCollective(ranks, rank))
        return OneSequence(model).run(IDS)

    with ThreadPoolExecutor(world) as pool:
        parts = list(pool.map(run, range(world)))
    for part in parts:
        torch.testing.assert_close(part, whole, atol=5e-5, rtol=1e-5)


def test_a_vocabulary_that_ranks_cannot_split_evenly_is_padded() -> None:
    folder = tiny_model("llama", vocab_size=257)[1]
    whole = OneSequence(fused(folder)).run(IDS)
    ranks = Ranks(2)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda rank: OneSequence(fused(folder, rank=rank, world=2, collective=ThreadCollective(ranks, rank))).run(
                IDS
            ),
            range(2),
        )
    assert first.shape == whole.shape
    torch.testing.assert_close(first, whole, atol=5e-5, rtol=1e-5)
    assert torch.equal(first, second)


class ForbiddenCalls(TorchDispatchMode):
    """Fails on what would wait for a device, or give shapes that depend on data."""

    WORDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in self.WORDS, f"the forward pass calls {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["gemma 3 tied, with capped logits", "granite", "qwen3"])
def test_nothing_in_a_forward_pass_waits_for_the_device(case: str) -> None:
    sequence = OneSequence(fused(folder_of(case)))
    with ForbiddenCalls():
        sequence.run(IDS, [3, 59])


def test_tokens_that_nobody_wants_go_no_further_than_the_last_attention() -> None:
    model = fused(folder_of("llama"))
    rows: list[int] = []
    for layer in model.layers:
        layer.down.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))  # type: ignore[union-attr, operator]
    OneSequence(model).run(IDS, [59])
    assert rows == [60, 60, 1]


def test_the_model_tells_its_device_and_configuration() -> None:
    model = fused(folder_of("gemma"))
    assert isinstance(model, FusedDecoder)
    assert model.device == torch.device("cpu")
    assert model.config.model_type == "gemma"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
