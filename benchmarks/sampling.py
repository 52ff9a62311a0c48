"""``python -m benchmarks.sampling``: what sampling costs a step on a CPU, beside a sort of the vocabulary."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from pagedserve_engine.sampling import Randomness, SamplingTensors, sample
from pagedserve_engine.sampling_filters import Filters, floors_by_bisection

VOCABULARIES = (49_152, 262_144)
ROWS = (1, 16, 64)


def zipf_logits(rows: int, vocab: int) -> torch.Tensor:
    """Logits [rows, vocab] that fall off as a language model's do, in an order of each row's own."""
    generator = torch.Generator().manual_seed(0)
    ranked = -1.6 * torch.arange(1, vocab + 1).log()
    orders = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)])
    return ranked[orders] + 0.3 * torch.randn(rows, vocab, generator=generator)


def ways(logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    rows = len(logits)
    uniform = torch.rand(rows, 1, dtype=torch.float64)
    top_p = torch.full((rows, 1), 0.95, dtype=torch.float64)
    top_k = torch.full((rows, 1), 50)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()

    def drawn(filters: Filters | None) -> Callable[[], object]:
        tensors = SamplingTensors(random=Randomness(None, torch.ones(rows, 1), uniform, filters))
        return lambda: sample(logits, tensors)

    by_p = Filters(None, None, top_p, None)
    return {
        "greedy": lambda: sample(logits, SamplingTensors()),
        "temperature": drawn(None),
        "min_p": drawn(Filters(None, None, None, torch.full((rows, 1), 0.05))),
        "top_k": drawn(Filters(None, top_k, None, None)),
        "top_p": drawn(by_p),
        "top_k and top_p": drawn(Filters(None, top_k, top_p, None)),
        "bisection for top_p alone": lambda: floors_by_bisection(weights, torch.zeros(rows, 1), by_p),
        "torch.sort and running sum": lambda: logits.sort(-1, descending=True).values.softmax(-1).cumsum(-1),
    }


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The fastest of ``repeats``: what else the machine does only ever adds."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(ways(zipf_logits(1, 256)))
    print(f"| vocabulary | rows | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for vocab in VOCABULARIES:
        for rows in ROWS:
            times = [milliseconds(work, options.repeats) for work in ways(zipf_logits(rows, vocab)).values()]
            print(f"| {vocab:,} | {rows} | {' | '.join(f'{ms:.1f}' for ms in times)} |", flush=True)


if __name__ == "__main__":
    main()
