"""Captured steps on a CPU: a stand-in for CUDA's graphs, and drawing as a captured step does it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagedserve_engine.sampling import Randomness, SamplingTensors, sample
from pagedserve_engine.sampling_filters import Filters


class RepeatingRecorder:
    """Replays by running the same work on the same tensors again; counts, and may refuse to record."""

    def __init__(self, *, refuses: str | None = None, bytes_each: int = 0) -> None:
        self._refuses = refuses
        self._bytes_each = bytes_each
        self.num_recorded = 0
        self.num_replayed = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        if self._refuses is not None and self.num_recorded:
            raise RuntimeError(self._refuses)
        self.num_recorded += 1
        body()

        def replay() -> None:
            self.num_replayed += 1
            body()

        return replay

    def measure(self) -> int:
        return self.num_recorded * self._bytes_each


def draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """As ``sampling`` draws: rows of ``numbers`` [6, S] as in ``Draws``."""
    inverse_temperature, top_k, top_p, min_p, greedy, uniform = (part.unsqueeze(1) for part in numbers.unbind(0))
    random = Randomness(
        rows=None,
        inverse_temperature=inverse_temperature.float(),
        uniform=uniform,
        filters=Filters(rows=None, top_k=top_k.long().clamp(min=1), top_p=top_p, min_p=min_p.float()),
    )
    drawn = sample(logits, SamplingTensors(random=random)).token_ids
    return torch.where(greedy.squeeze(1) > 0, logits.argmax(-1), drawn)
