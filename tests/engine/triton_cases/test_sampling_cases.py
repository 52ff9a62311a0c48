"""The sampling kernels against sampling as its definition reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from naive_sampling import drawn, kept
from pagedserve_engine.kernels.sampling import BLOCK, sample
from triton_device import DEVICE, on_the_device

pytestmark = on_the_device

Row = tuple[float, int, float, float]
"""Temperature (0: greedy), top_k (0: off), top_p and min_p."""

ROWS: list[Row] = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (1.3, 5, 1.0, 0.0),
    (1.0, 40, 0.9, 0.0),
    (1.0, 700, 0.99, 0.0),
    (1.0, 0, 0.3, 0.0),
    (1.0, 0, 0.95, 0.0),
    (2.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.5, 30, 0.8, 0.02),
]


def ours(logits: torch.Tensor, rows: list[Row], uniform: np.ndarray) -> list[int]:
    temperatures, top_k, top_p, min_p = (np.array(values) for values in zip(*rows, strict=True))
    vocab = logits.shape[1]

    def on_device(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(dtype).to(DEVICE)

    return sample(
        logits.to(DEVICE),
        inverse_temperature=on_device(1 / np.where(temperatures > 0, temperatures, 1.0), torch.float32),
        top_k=on_device(np.where(top_k > 0, top_k, vocab), torch.int64),
        top_p=on_device(top_p, torch.float64),
        min_p=on_device(min_p, torch.float32),
        greedy=on_device(temperatures == 0, torch.bool),
        uniform=on_device(uniform, torch.float64),
    ).tolist()


def theirs(logits: torch.Tensor, rows: list[Row], uniform: np.ndarray) -> list[int]:
    tokens = []
    for scores, (temperature, top_k, top_p, min_p), place in zip(logits.double().numpy(), rows, uniform, strict=True):
        if temperature == 0:
            tokens.append(int(scores.argmax()))
            continue
        # The rounding decides which weights are alike.
        scaled = np.float32(scores - scores.max()) * np.float32(1 / temperature)
        weights = np.exp(scaled.astype(np.float64))
        tokens.append(drawn(np.where(kept(weights, top_k=top_k, top_p=top_p, min_p=min_p), weights, 0), place))
    return tokens


@pytest.mark.parametrize(
    ("vocab", "dtype", "spread"),
    [
        (1000, torch.float32, 3.0),
        (1000, torch.bfloat16, 0.1),
        (100, torch.bfloat16, 3.0),
        (4 * BLOCK, torch.float32, 0.1),
    ],
)
def test_the_token_is_the_one_that_the_definition_names(vocab: int, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(len(ROWS), vocab, generator=generator) * spread).to(dtype)
    uniform = np.random.default_rng(vocab).random(len(ROWS))
    assert ours(logits, ROWS, uniform) == theirs(logits, ROWS, uniform)


@pytest.mark.parametrize("uniform", [0.0, 1 - 1e-9])
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_token_kept(uniform: float) -> None:
    logits = torch.randn(len(ROWS), 300, generator=torch.Generator().manual_seed(1))
    ends = np.full(len(ROWS), uniform)
    assert ours(logits, ROWS, ends) == theirs(logits, ROWS, ends)


def test_equally_likely_tokens_are_kept_together() -> None:
    logits = torch.zeros(2, 300)
    logits[:, 200] = 1.0
    rows: list[Row] = [(1.0, 2, 1.0, 0.0), (1.0, 0, 0.02, 0.0)]
    uniform = np.array([0.999, 0.999])
    assert ours(logits, rows, uniform) == theirs(logits, rows, uniform) == [299, 299]


def test_the_lowest_of_equal_peaks_is_the_greedy_token() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [317, 318, 900]] = 4.0
    assert ours(logits, [(0.0, 0, 1.0, 0.0)] * 2, np.zeros(2)) == [317, 0]


def test_forbidden_tokens_are_never_drawn_and_a_row_without_any_other_gives_token_0() -> None:
    logits = torch.full((3, 500), -torch.inf)
    logits[1:, 411] = -7.0
    rows: list[Row] = [(1.0, 0, 1.0, 0.0), (1.0, 10, 0.9, 0.1), (1.0, 0, 0.9, 0.0)]
    assert ours(logits, rows, np.full(3, 0.99)) == [0, 411, 411]


def test_rows_may_lie_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 400, generator=generator)
    uniform = np.array([0.2, 0.5, 0.8])
    assert ours(wide[:, :333], ROWS[4:7], uniform) == theirs(wide[:, :333], ROWS[4:7], uniform)
